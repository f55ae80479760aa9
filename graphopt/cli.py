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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from graphopt.api import calibrates, channel_groups, check, inspect, lint, optimize
from graphopt.arguments import Command, add_command, add_data_arguments, add_memory_budget, data_files, refuse_outputs
from graphopt.calibration_commands import add_calibrate, add_merge_ranges
from graphopt.errors import GraphoptError, OutputError
from graphopt.garbage import rare_collections
from graphopt.model_io import load_model
from graphopt.passes import registry
from graphopt.pipeline import parse_pipeline
from graphopt.report.console import print_check, print_inspection, print_passes, print_report
from graphopt.report.groups import print_groups
from graphopt.report.lint import print_lint, print_rules
from graphopt.report.records import plain_values
from graphopt.report.terminal import progress_bars
from graphopt.targets import target_named, targets
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
        command: Command = parsed.command
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
    refuse_outputs(outputs, overwrite=arguments.overwrite, inputs=(*model.files, *data_files(arguments)))
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="graphopt", description="Compiler passes for ONNX: fold, calibrate, quantize, check.")
    parser.add_argument("--version", action="version", version=f"graphopt {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    optimizing = add_command(commands, "optimize", _optimize, "run passes over a model and write the result")
    optimizing.add_argument("model", metavar="MODEL", help="the float ONNX model; never changed")
    optimizing.add_argument(
        "--passes", required=True, metavar="PIPELINE", help="such as fold,calibrate:method=entropy,qdq"
    )
    optimizing.add_argument("-o", "--output", metavar="OUT", help="default: MODEL with the suffix .opt.onnx")
    add_data_arguments(optimizing)
    optimizing.add_argument("--target", default="ort-cpu", metavar="T", help=", ".join(targets()))
    optimizing.add_argument(
        "--ranges",
        metavar="FILE",
        help="written by calibrate (*.cache: for TensorRT); read when the pipeline has no calibrate: also a TensorRT "
        "cache or onnxruntime's calibration JSON",
    )
    add_memory_budget(optimizing)
    optimizing.add_argument("--report", metavar="FILE.json", help="write what happened as JSON")
    optimizing.add_argument("--json", action="store_true", help="print what happened as JSON on stdout")
    optimizing.add_argument("--no-verify", action="store_true", help="skip the checks after each pass and at the end")
    optimizing.add_argument("--overwrite", action="store_true", help="replace files that exist")

    add_calibrate(commands)
    add_merge_ranges(commands)

    checking = add_command(commands, "check", _check, "compare a model with its float original")
    checking.add_argument("float", metavar="FLOAT", help="the reference")
    checking.add_argument("other", metavar="OTHER", help="the model to judge")
    add_data_arguments(checking)
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

    inspecting = add_command(commands, "inspect", _inspect, "size, parameters, MACs, operators and dtypes")
    inspecting.add_argument("model", metavar="MODEL")
    inspecting.add_argument("--json", action="store_true", help="print JSON")

    grouping = add_command(commands, "groups", _groups, "which channels prune removes together, and which stay and why")
    grouping.add_argument("model", metavar="MODEL")
    grouping.add_argument(
        "--passes", default="fold", metavar="PIPELINE", help="what optimize runs before prune; default: fold"
    )
    grouping.add_argument("--json", action="store_true", help="print JSON")

    linting = add_command(commands, "lint", _lint, "hold a quantized model against the rules of a target")
    linting.add_argument("model", metavar="MODEL", nargs="?")
    linting.add_argument("--target", default="ort-cpu", metavar="T", help=", ".join(targets()))
    linting.add_argument("--list", action="store_true", help="list the rules of the target instead")
    linting.add_argument("--json", action="store_true", help="print JSON")

    add_command(commands, "passes", _passes, "list every pass with its options")
    return parser


if __name__ == "__main__":
    sys.exit(main())
