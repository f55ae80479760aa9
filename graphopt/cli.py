"""The command line: arguments in, tables out. Everything else is in `graphopt.api`.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done and within limits; 1 done, but a check
or a lint rule failed, or a pass was rolled back; 2 the request or the input is wrong, in one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from graphopt.api import calibrate, calibrate_on_cluster, calibrates, channel_groups, check, inspect, lint, optimize
from graphopt.data import Shard, data_file
from graphopt.errors import DataError, GraphoptError, OutputError, PipelineError
from graphopt.garbage import rare_collections
from graphopt.merging import merged
from graphopt.model_io import load_model, refuse_target
from graphopt.pass_base import MEMORY_BUDGET
from graphopt.passes import registry
from graphopt.passes.calibrate import DEFAULT_METHOD
from graphopt.pipeline import parse_pipeline
from graphopt.preprocess import describe_keys, preprocess_file
from graphopt.progress import Progress
from graphopt.ranges import Ranges
from graphopt.ranges_files import write_ranges
from graphopt.report.console import print_check, print_inspection, print_passes, print_ranges, print_report
from graphopt.report.groups import print_groups
from graphopt.report.lint import print_lint, print_rules
from graphopt.report.records import plain_values
from graphopt.report.terminal import progress_bars
from graphopt.targets import TARGETS, target_named
from graphopt.thresholds import Method
from graphopt.version import VERSION

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


@rare_collections()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parsed = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for
    errors = _Console(stderr=True, highlight=False)
    try:
        command: Callable[[argparse.Namespace, Console, Console], int] = parsed.command
        return command(parsed, _Console(highlight=False), errors)
    except GraphoptError as error:
        errors.print(f"[red]error:[/red] {escape(_one_line(error))}", soft_wrap=True)
        return WRONG
    except BrokenPipeError:  # the reader of stdout went away: `graphopt passes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more on exit
        return OK
    except KeyboardInterrupt:
        errors.print("interrupted: no file is left half written")
        return INTERRUPTED


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the exit code to `main`: rich would exit with 1."""
        raise BrokenPipeError


def _one_line(error: Exception) -> str:
    return " ".join(str(error).splitlines())


def _optimize(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    pipeline = parse_pipeline(arguments.passes, registry())
    path = Path(arguments.model)
    output = path.with_suffix(".opt.onnx") if arguments.output is None else Path(arguments.output)
    report_path = _report_path(arguments.report)
    outputs = {"-o": output, "--report": report_path}
    if calibrates(pipeline):
        outputs["--ranges"] = None if arguments.ranges is None else Path(arguments.ranges)
    model = load_model(path)
    _refuse_outputs(outputs, overwrite=arguments.overwrite, inputs=(*model.files, *_data_files(arguments)))
    with progress_bars(errors) as progress:
        result = optimize(
            model,
            pipeline,
            data=arguments.data,
            preprocess=arguments.preprocess,
            samples=arguments.samples,
            target=arguments.target,
            ranges=arguments.ranges,
            memory_budget=arguments.memory_budget * 2**20,
            verify=not arguments.no_verify,
            progress=progress,
            failure_folder=output.with_suffix(".failure"),
        )
    result.save(output, overwrite=arguments.overwrite)
    report = result.report
    report.output = str(output)
    if report_path is not None:
        report.save(report_path)
    for warning in report.warnings:
        errors.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report, console)
        console.print(f"wrote {escape(str(output))}", soft_wrap=True)
    return FAILED if report.failed else OK


def _calibrate(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    output = Path(arguments.output)
    method = _method(arguments.method)
    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    model = load_model(arguments.model)
    _refuse_outputs({"-o": output}, overwrite=arguments.overwrite, inputs=(*model.files, *_data_files(arguments)))
    options = {
        "preprocess": arguments.preprocess,
        "passes": arguments.passes,
        "method": method,
        "percent": arguments.percent,
        "moments": arguments.moments,
        "samples": arguments.samples,
        "target": arguments.target,
        "memory_budget": arguments.memory_budget * 2**20,
    }
    with progress_bars(errors) as progress:
        if arguments.scheduler is not None:
            ranges, warnings = _on_cluster(arguments, shard, options, progress), list[str]()
        else:
            ranges, report = calibrate(
                model, arguments.data, histograms=arguments.histograms, shard=shard, progress=progress, **options
            )
            warnings = report.warnings
    for warning in warnings:
        errors.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    return _write_ranges(ranges, output, arguments, console)


def _on_cluster(
    arguments: argparse.Namespace, shard: Shard | None, options: Mapping[str, Any], progress: Progress
) -> Ranges:
    if shard is not None or arguments.data is None:
        raise PipelineError(
            "a cluster divides --data into shards itself: give --data, and --shards N instead of --shard"
        )
    model, data = (str(Path(path).absolute()) for path in (arguments.model, arguments.data))
    return calibrate_on_cluster(arguments.scheduler, model, data, shards=arguments.shards, progress=progress, **options)


def _merge_ranges(arguments: argparse.Namespace, console: Console, errors: Console) -> int:  # noqa: ARG001 - one signature for all commands
    paths = [Path(each) for each in arguments.files]
    output = Path(arguments.output)
    _refuse_outputs({"-o": output}, overwrite=arguments.overwrite, inputs=paths)
    parts = [Ranges.load(path) for path in paths]
    ranges = merged(parts) if len(parts) > 1 or parts[0].shard else parts[0]
    if arguments.method is not None or arguments.target is not None:
        method = ranges.method if arguments.method is None else _method(arguments.method)
        if method is None:
            raise DataError(f"{paths[0]} does not say by which method its ranges were chosen: name one with --method")
        target = target_named(arguments.target or ranges.target)
        ranges = ranges.rechosen(method, percent=arguments.percent, target=target)
    return _write_ranges(ranges, output, arguments, console)


def _write_ranges(ranges: Ranges, output: Path, arguments: argparse.Namespace, console: Console) -> int:
    write_ranges(ranges, output)
    if arguments.json:
        print(ranges.to_text(), end="")
    else:
        print_ranges(ranges, console)
        console.print(f"wrote {escape(str(output))}", soft_wrap=True)
    return OK


def _method(text: str) -> Method:
    try:
        return Method(text)
    except ValueError:
        raise PipelineError(f"no method is called '{text}'; there are: {', '.join(_METHODS)}") from None


_METHODS = [method.value for method in Method]


def _check(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    with progress_bars(errors) as progress:
        result = check(
            arguments.float,
            arguments.other,
            data=arguments.data,
            preprocess=arguments.preprocess,
            samples=arguments.samples,
            layers=arguments.layers,
            exact=arguments.exact,
            progress=progress,
        )
    if arguments.data is None:
        errors.print("[yellow]warning:[/yellow] no --data: the models were compared on made-up inputs")
    for note in result.notes:
        errors.print(f"[yellow]warning:[/yellow] {escape(note)}", soft_wrap=True)
    shortfalls = result.shortfalls(arguments.min_sqnr, arguments.min_agreement)
    if arguments.json:
        print(json.dumps(plain_values(asdict(result) | {"shortfalls": shortfalls}), indent=2))
    else:
        print_check(result, console)
    for shortfall in shortfalls:
        errors.print(f"[red]failed:[/red] {escape(shortfall)}", soft_wrap=True)
    return FAILED if shortfalls else OK


def _inspect(arguments: argparse.Namespace, console: Console, errors: Console) -> int:  # noqa: ARG001 - one signature for all commands
    found = inspect(arguments.model)
    if arguments.json:
        print(json.dumps(plain_values(found.to_json()), indent=2))
    else:
        print_inspection(found, console)
    return OK


def _groups(arguments: argparse.Namespace, console: Console, errors: Console) -> int:  # noqa: ARG001 - one signature for all commands
    found = channel_groups(arguments.model, passes=arguments.passes)
    if arguments.json:
        print(json.dumps(plain_values(found.to_json()), indent=2))
    else:
        print_groups(found, console)
    return OK


def _lint(arguments: argparse.Namespace, console: Console, errors: Console) -> int:  # noqa: ARG001 - one signature for all commands
    if arguments.list:
        print_rules(target_named(arguments.target), console)
        return OK
    if arguments.model is None:
        raise GraphoptError("lint needs a model: graphopt lint MODEL --target T")
    found = lint(arguments.model, arguments.target)
    if arguments.json:
        print(json.dumps(plain_values(found.to_json()), indent=2))
    else:
        print_lint(found, console)
    return FAILED if found.failed else OK


def _passes(arguments: argparse.Namespace, console: Console, errors: Console) -> int:  # noqa: ARG001 - one signature for all commands
    print_passes(registry(), console)
    return OK


def _refuse_outputs(outputs: Mapping[str, Path | None], *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse what cannot be written, before the long work; `outputs` are the files by the flag that names them.

    Raises:
        OutputError: a file cannot be written, or two flags name the same one.
    """
    flags: dict[str, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        refuse_target(path, overwrite=overwrite, protect=inputs)
        other = flags.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise OutputError(f"{other} and {flag} both name {path}: give each a file of its own")


def _report_path(text: str | None) -> Path | None:
    """Where the report goes.

    Raises:
        OutputError: not a kind of report that there is.
    """
    if text is None:
        return None
    if not text.endswith(".json"):
        raise OutputError(f"--report writes JSON: name a file that ends in .json, not '{text}'")
    return Path(text)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all others of this program."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit."""
        self.exit(WRONG, f"error: {message}; see {self.prog} --help\n")


def _decibels(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


_decibels.__name__ = "number of dB"  # argparse names the type when it refuses a value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


_share.__name__ = "share from 0 to 1"


def _mebibytes(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_mebibytes.__name__ = "number of MiB from 1 up"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="graphopt", description="Compiler passes for ONNX: fold, calibrate, quantize, check.")
    parser.add_argument("--version", action="version", version=f"graphopt {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    optimizing = _command(commands, "optimize", _optimize, "run passes over a model and write the result")
    optimizing.add_argument("model", metavar="MODEL", help="the float ONNX model; never changed")
    optimizing.add_argument(
        "--passes", required=True, metavar="PIPELINE", help="such as fold,calibrate:method=entropy,qdq"
    )
    optimizing.add_argument("-o", "--output", metavar="OUT", help="default: MODEL with the suffix .opt.onnx")
    _add_data_arguments(optimizing)
    optimizing.add_argument("--target", default="ort-cpu", metavar="T", help=f"{', '.join(TARGETS)}")
    optimizing.add_argument(
        "--ranges",
        metavar="FILE",
        help="written by calibrate (*.cache: for TensorRT); read when the pipeline has no calibrate: also a TensorRT "
        "cache or onnxruntime's calibration JSON",
    )
    _add_memory_budget(optimizing)
    optimizing.add_argument("--report", metavar="FILE.json", help="write what happened as JSON")
    optimizing.add_argument("--json", action="store_true", help="print what happened as JSON on stdout")
    optimizing.add_argument("--no-verify", action="store_true", help="skip the checks after each pass and at the end")
    optimizing.add_argument("--overwrite", action="store_true", help="replace files that exist")

    calibrating = _command(commands, "calibrate", _calibrate, "find the ranges of activations and write them to a file")
    calibrating.add_argument("model", metavar="MODEL", help="the float ONNX model; never changed")
    _add_data_arguments(calibrating)
    calibrating.add_argument("-o", "--output", required=True, metavar="RANGES.json", help="for --ranges of optimize")
    calibrating.add_argument(
        "--passes", default="fold", metavar="PIPELINE", help="what optimize runs before calibrate; default: fold"
    )
    calibrating.add_argument("--target", default="ort-cpu", metavar="T", help=f"{', '.join(TARGETS)}")
    calibrating.add_argument("--method", default=DEFAULT_METHOD.value, metavar="M", help=f"{', '.join(_METHODS)}")
    calibrating.add_argument("--percent", type=float, default=99.99, metavar="P", help="for the method percentile")
    calibrating.add_argument("--histograms", action="store_true", help="keep them, to choose other ranges later")
    calibrating.add_argument("--moments", action="store_true", help="exact mean and mean square, up to twice the time")
    calibrating.add_argument(
        "--shard", metavar="I/N", help="use every Nth sample from the Ith on, for merge-ranges; keeps histograms"
    )
    calibrating.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run shards on the workers of this dask.distributed cluster, which read MODEL and DATA at the same paths",
    )
    calibrating.add_argument("--shards", type=int, metavar="N", help="for --scheduler; default: one for each worker")
    _add_memory_budget(calibrating)
    calibrating.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    calibrating.add_argument("--json", action="store_true", help="print the file on stdout too")

    merging = _command(
        commands, "merge-ranges", _merge_ranges, "merge the ranges of shards, or choose others from the histograms"
    )
    merging.add_argument("files", nargs="+", metavar="FILE", help="what calibrate --shard wrote, or --histograms")
    merging.add_argument("-o", "--output", required=True, metavar="RANGES.json")
    merging.add_argument("--method", metavar="M", help=f"choose anew by {', '.join(_METHODS)}")
    merging.add_argument("--percent", type=float, default=99.99, metavar="P", help="for the method percentile")
    merging.add_argument("--target", metavar="T", help="choose anew for this target")
    merging.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    merging.add_argument("--json", action="store_true", help="print the file on stdout too")

    checking = _command(commands, "check", _check, "compare a model with its float original")
    checking.add_argument("float", metavar="FLOAT", help="the reference")
    checking.add_argument("other", metavar="OTHER", help="the model to judge")
    _add_data_arguments(checking)
    checking.add_argument("--min-sqnr", type=_decibels, metavar="DB", help="exit with 1 if an output is under it")
    checking.add_argument(
        "--min-agreement", type=_share, metavar="F", help="exit with 1 if top-1 agreement, from 0 to 1, is under it"
    )
    checking.add_argument("--layers", action="store_true", help="compare every tensor that both compute")
    checking.add_argument(
        "--exact",
        action="store_true",
        help="compare with the arithmetic that Q and DQ stand for, not onnxruntime's int8 kernels on this CPU",
    )
    checking.add_argument("--json", action="store_true", help="print JSON")

    inspecting = _command(commands, "inspect", _inspect, "size, parameters, MACs, operators and dtypes")
    inspecting.add_argument("model", metavar="MODEL")
    inspecting.add_argument("--json", action="store_true", help="print JSON")

    grouping = _command(commands, "groups", _groups, "which channels prune removes together, and which stay and why")
    grouping.add_argument("model", metavar="MODEL")
    grouping.add_argument(
        "--passes", default="fold", metavar="PIPELINE", help="what optimize runs before prune; default: fold"
    )
    grouping.add_argument("--json", action="store_true", help="print JSON")

    linting = _command(commands, "lint", _lint, "hold a quantized model against the rules of a target")
    linting.add_argument("model", metavar="MODEL", nargs="?")
    linting.add_argument("--target", default="ort-cpu", metavar="T", help=f"{', '.join(TARGETS)}")
    linting.add_argument("--list", action="store_true", help="list the rules of the target instead")
    linting.add_argument("--json", action="store_true", help="print JSON")

    _command(commands, "passes", _passes, "list every pass with its options")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Console, Console], int], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=run)
    return parser


def _add_memory_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-budget",
        type=_mebibytes,
        default=MEMORY_BUDGET // 2**20,
        metavar="MIB",
        help="of activations that calibration may hold at a time; default: %(default)s",
    )


def _data_files(arguments: argparse.Namespace) -> list[Path]:
    """The files and folders that `_add_data_arguments` asks for."""
    data = None if arguments.data is None else data_file(arguments.data)
    preprocess = None if arguments.preprocess is None else preprocess_file(arguments.preprocess)
    return [path for path in (data, preprocess) if path is not None]


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="an .npz, a folder of .npz, of test_data_set_*/input_*.pb or of images, or file.py:function",
    )
    parser.add_argument(
        "--preprocess",
        metavar="KEYS",
        help="how images in DATA become arrays, (pixel / scale - mean) / std, such as "
        "resize=256:crop=224:mean=0.485+0.456+0.406:std=0.229+0.224+0.225, or a file.toml with these keys. "
        f"{describe_keys()}. EXIF orientation is applied, transparency laid over white, 16 bits become 8",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="use at most N samples of DATA")


if __name__ == "__main__":
    sys.exit(main())
