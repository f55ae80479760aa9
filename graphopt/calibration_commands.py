"""The commands `calibrate` and `merge-ranges`: ranges of activations into a file, and from files into another."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from graphopt.api import calibrate, calibrate_on_cluster
from graphopt.arguments import add_command, add_data_arguments, add_memory_budget, data_files, refuse_outputs
from graphopt.data import Shard
from graphopt.errors import DataError, PipelineError
from graphopt.merging import merged
from graphopt.model_io import load_model
from graphopt.progress import Progress
from graphopt.ranges import Ranges
from graphopt.ranges_files import write_ranges
from graphopt.report.console import print_ranges
from graphopt.report.terminal import progress_bars
from graphopt.targets import target_named, targets
from graphopt.thresholds import Method

_METHODS = [method.value for method in Method]
_OK = 0


def add_calibrate(commands: Any) -> None:
    """Add the command `calibrate`."""
    calibrating = add_command(
        commands, "calibrate", _calibrate, "find the ranges of activations and write them to a file"
    )
    calibrating.add_argument("model", metavar="MODEL", help="the float ONNX model; never changed")
    add_data_arguments(calibrating)
    calibrating.add_argument("-o", "--output", required=True, metavar="RANGES.json", help="for --ranges of optimize")
    calibrating.add_argument(
        "--passes", default="fold", metavar="PIPELINE", help="what optimize runs before calibrate; default: fold"
    )
    calibrating.add_argument("--target", default="ort-cpu", metavar="T", help=", ".join(targets()))
    calibrating.add_argument(
        "--method", default=Method.MSE.value, metavar="M", help=f"{', '.join(_METHODS)}; default: mse"
    )
    calibrating.add_argument("--percent", type=float, default=99.99, metavar="P", help="for the method percentile")
    calibrating.add_argument("--histograms", action="store_true", help="keep them, to choose other ranges later")
    calibrating.add_argument("--moments", action="store_true", help="exact mean and mean square, up to twice the time")
    calibrating.add_argument(
        "--channels", action="store_true", help="minimum, maximum, mean and variance by channel too: one more run"
    )
    calibrating.add_argument(
        "--shard", metavar="I/N", help="use every Nth sample from the Ith on, for merge-ranges; keeps histograms"
    )
    calibrating.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run shards on the workers of this dask.distributed cluster, which read MODEL and DATA at the same paths",
    )
    calibrating.add_argument("--shards", type=int, metavar="N", help="for --scheduler; default: one for each worker")
    add_memory_budget(calibrating)
    calibrating.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    calibrating.add_argument("--json", action="store_true", help="print the file on stdout too")


def add_merge_ranges(commands: Any) -> None:
    """Add the command `merge-ranges`."""
    merging = add_command(
        commands, "merge-ranges", _merge_ranges, "merge the ranges of shards, or choose others from the histograms"
    )
    merging.add_argument("files", nargs="+", metavar="FILE", help="what calibrate --shard wrote, or --histograms")
    merging.add_argument("-o", "--output", required=True, metavar="RANGES.json")
    merging.add_argument("--method", metavar="M", help=f"choose anew by {', '.join(_METHODS)}")
    merging.add_argument("--percent", type=_percent, metavar="P", help="for the method percentile; default: the file's")
    merging.add_argument("--target", metavar="T", help="choose anew for this target")
    merging.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    merging.add_argument("--json", action="store_true", help="print the file on stdout too")


def _calibrate(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    output = Path(arguments.output)
    method = _method(arguments.method)
    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    model = load_model(arguments.model)
    refuse_outputs({"-o": output}, overwrite=arguments.overwrite, inputs=(*model.files, *data_files(arguments)))
    options = {
        "preprocess": arguments.preprocess,
        "passes": arguments.passes,
        "method": method,
        "percent": arguments.percent,
        "moments": arguments.moments,
        "channels": arguments.channels,
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
    refuse_outputs({"-o": output}, overwrite=arguments.overwrite, inputs=paths)
    parts = [Ranges.load(path) for path in paths]
    ranges = merged(parts) if len(parts) > 1 or parts[0].shard else parts[0]
    if (arguments.method, arguments.percent, arguments.target) != (None, None, None):
        method = ranges.method if arguments.method is None else _method(arguments.method)
        if method is None:
            raise DataError(f"{paths[0]} does not say by which method its ranges were chosen: name one with --method")
        target = target_named(arguments.target or ranges.target)
        percent = ranges.percent if arguments.percent is None else arguments.percent
        ranges = ranges.rechosen(method, percent=percent, target=target)
    return _write_ranges(ranges, output, arguments, console)


def _write_ranges(ranges: Ranges, output: Path, arguments: argparse.Namespace, console: Console) -> int:
    write_ranges(ranges, output)
    if arguments.json:
        print(ranges.to_text(), end="")
    else:
        print_ranges(ranges, console)
        console.print(f"wrote {escape(str(output))}", soft_wrap=True)
    return _OK


def _method(text: str) -> Method:
    try:
        return Method(text)
    except ValueError:
        raise PipelineError(f"no method is called '{text}'; there are: {', '.join(_METHODS)}") from None


def _percent(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100:
        raise ValueError
    return value


_percent.__name__ = "percent above 0 and at most 100"  # argparse names the type when it refuses a value
