"""What a Python caller uses: `optimize`, `check`, `lint` and `inspect`; the command line is a thin layer over these."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.channel_groups import ChannelGroups
from graphopt.channels import find_groups
from graphopt.checking import Check, check_models
from graphopt.cluster import ranges_of_shards
from graphopt.data import DataSource, Shard, load_samples, refuse_limit
from graphopt.errors import DataError, PipelineError
from graphopt.feeds import Samples
from graphopt.files import sha256_of
from graphopt.garbage import rare_collections
from graphopt.half_precision import computes_in_half
from graphopt.input_values import with_input_values
from graphopt.inspection import Inspection, inspect_model
from graphopt.lint import LintReport, Severity, lint_model
from graphopt.made_up import made_up_samples
from graphopt.merging import merged
from graphopt.model_io import Model, Source, load_model, refuse_target
from graphopt.pass_base import MEMORY_BUDGET, Context, Effect, Pass, input_values
from graphopt.pass_manager import PassManager, Result
from graphopt.passes import Calibrate, Fold, FreezeInputs, InlineFunctions, InsertQdq, ToFloat32, registry
from graphopt.pipeline import parse_pipeline
from graphopt.preprocess import AnyPreprocess
from graphopt.progress import Progress, silent
from graphopt.ranges import Ranges
from graphopt.ranges_files import read_ranges, write_ranges
from graphopt.report.records import Report
from graphopt.runtime import open_session
from graphopt.targets import target_named
from graphopt.thresholds import Method

CHECK_SAMPLES = 64
"""Samples that the check at the end of `optimize` uses; `check` uses all that it is given."""

_UNCALIBRATED = (
    "no data were used for the ranges: they come from statistics stored in BatchNormalization and from made-up inputs, "
    "so they are guesses; calibrate with --data"
)


@rare_collections()
def optimize(
    model: Source,
    passes: str | Sequence[Pass],
    *,
    data: DataSource | None = None,
    preprocess: AnyPreprocess | None = None,
    samples: int | None = None,
    target: str = "ort-cpu",
    ranges: str | Path | Ranges | None = None,
    memory_budget: int = MEMORY_BUDGET,
    verify: bool = True,
    progress: Progress = silent,
    failure_folder: Path | None = None,
) -> Result:
    """Run a pipeline over a model; the model, its file and its data stay as they are.

    Args:
        model: a path, a ModelProto or a gs.Graph.
        passes: pipeline text such as "fold,calibrate,qdq", or passes.
        data: what `load_samples` takes; None: ranges come without data (`graphopt.data_free`), and the report says so.
        preprocess: how a folder of images becomes arrays, as text ("resize=256:crop=224"), a TOML file or a
            `Preprocess`, which describes the keys.
        samples: use at most this many samples of `data`.
        target: a name in `graphopt.targets.targets()`.
        ranges: a file that `calibrate` writes (a TensorRT cache if its name ends in .cache), or that is read when the
            pipeline has no `calibrate` (also a TensorRT cache or onnxruntime's calibration JSON); or ranges.
        memory_budget: bytes of activations that calibration may hold at a time.
        verify: check the model after every pass, and compare with the float model after a lossy one.
        progress: is told how far the work is.
        failure_folder: gets what reproduces the failure of a pass.

    Raises:
        GraphoptError: the model, the data or the request is wrong.
    """
    pipeline = parse_pipeline(passes, registry()) if isinstance(passes, str) else list(passes)
    context = Context(target=target_named(target), progress=progress, memory_budget=memory_budget)
    float_model = with_input_values(load_model(model), input_values(pipeline))
    pipeline = _in_float32(pipeline, float_model)
    manager = PassManager(pipeline, verify=verify)
    ranges_file = Path(ranges) if isinstance(ranges, str | Path) else None
    if isinstance(ranges, Ranges):
        context.ranges = ranges
    elif ranges_file is not None and calibrates(pipeline):
        refuse_target(ranges_file, overwrite=True, protect=float_model.files)
    elif ranges_file is not None:
        context.ranges = read_ranges(ranges_file)
    other_model = _other_model(context.ranges, float_model)
    context.samples = _samples(float_model, data, preprocess, samples)
    result = manager.run(float_model, context, failure_folder=failure_folder)
    if ranges_file is not None and calibrates(pipeline) and context.ranges is not None:
        write_ranges(_of_model(context.ranges, float_model), ranges_file)
    if verify and _changed_outputs(pipeline, result):
        result.report.check = _final_check(float_model, result, context)
        result.report.warnings += result.report.check.comparison.resized()
    if verify and _quantized(pipeline, result):
        input_shapes = None if context.samples is None else context.samples.first_shapes()
        result.report.lint = lint_model(result.optimized, context.target, input_shapes)
        failed = result.report.lint.errors
        before = lint_model(float_model, context.target, input_shapes).errors if failed else frozenset()
        result.report.warnings += _lint_warnings(result.report, failed & before)
    result.report.warnings[:0] = [*_data_warnings(pipeline, context, result.report.check), *other_model]
    return result


@rare_collections()
def calibrate(
    model: Source,
    data: DataSource | None = None,
    *,
    passes: str | Sequence[Pass] = "fold",
    method: Method = Method.MSE,
    percent: float = 99.99,
    histograms: bool = False,
    moments: bool = False,
    channels: bool = False,
    preprocess: AnyPreprocess | None = None,
    samples: int | None = None,
    shard: Shard | None = None,
    target: str = "ort-cpu",
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress = silent,
) -> tuple[Ranges, Report]:
    """Find the ranges of the tensors that a target quantizes, and nothing else.

    Args:
        model: a path, a ModelProto or a gs.Graph.
        data: what `load_samples` takes; None: ranges come without data (`graphopt.data_free`).
        passes: what `optimize` will run before `calibrate`, so that tensors have the names that it will ask for.
        method: how ranges are chosen. SEARCH, the default of the pass, is not the one here: shards cannot search,
            and their ranges are to be those of all the data.
        percent: for the method percentile.
        histograms: whether to keep them, to merge ranges or to choose others later; always with `shard`.
        moments: whether mean and mean square are exact, not to half a bin: up to twice the time.
        channels: whether each tensor also gets minimum, maximum, mean and variance of its channels: one more run
            over the samples.
        preprocess: for a folder of images, as `optimize`.
        samples: use at most this many samples of `data`, before they are divided.
        shard: which part of the samples to use; `merged` makes one of all parts.
        target: a name in `graphopt.targets.targets()`.
        memory_budget: bytes of activations to hold at a time.
        progress: is told how far the work is.

    Returns:
        the ranges, and what happened.

    Raises:
        GraphoptError: the model, the data or the request is wrong.
    """
    pipeline = parse_pipeline(passes, registry()) if isinstance(passes, str) else list(passes)
    if calibrates(pipeline) or any(
        item.effect is Effect.LOSSY and not isinstance(item, ToFloat32) for item in pipeline
    ):
        raise PipelineError("the passes of calibrate are those that come before it in the pipeline of optimize")
    keep = histograms or shard is not None
    pipeline.append(Calibrate(method=method, percent=percent, histograms=keep, moments=moments, channels=channels))
    if shard is not None:
        if data is None:
            raise PipelineError("a shard is of the samples in --data: give them")
        if method.why_not_from_histograms is not None:
            raise PipelineError(f"{method.why_not_from_histograms}: parts of the data cannot be merged by it")
    float_model = with_input_values(load_model(model), input_values(pipeline))
    pipeline = _in_float32(pipeline, float_model)
    context = Context(target=target_named(target), progress=progress, memory_budget=memory_budget)
    context.samples = _samples(float_model, data, preprocess, samples)
    if shard is not None and context.samples is not None:
        context.samples = shard.of(context.samples)
    result = PassManager(pipeline, verify=False).run(float_model, context)
    result.report.warnings[:0] = _data_warnings(pipeline, context, None)
    assert context.ranges is not None, "calibrate leaves ranges or raises"
    found = _of_model(context.ranges, float_model)
    return replace(found, shard="" if shard is None else str(shard)), result.report


def calibrate_on_cluster(
    scheduler: str, model: str, data: str, *, shards: int | None = None, progress: Progress = silent, **options: Any
) -> Ranges:
    """As `calibrate`, with the samples divided among the workers of a dask.distributed cluster.

    Args:
        scheduler: its address.
        model: a path that every worker can read.
        data: a path that every worker can read.
        shards: parts of the samples; None: one for each worker.
        progress: is told how many shards are done.
        options: further arguments of `calibrate`.

    Raises:
        GraphoptError: as `calibrate`, or the cluster does not do the work.
    """
    work = partial(_calibrate_shard, model, data, options)
    return merged(ranges_of_shards(scheduler, shards, work, progress))


def _calibrate_shard(model: str, data: str, options: Mapping[str, Any], shard: Shard) -> Ranges:
    return calibrate(model, data, shard=shard, **options)[0]


def calibrates(pipeline: Sequence[Pass]) -> bool:
    """Whether a pipeline finds ranges itself, and so writes a ranges file instead of reading it."""
    return any(isinstance(item, Calibrate) for item in pipeline)


def _in_float32(pipeline: Sequence[Pass], model: Model) -> list[Pass]:
    """The passes, with `to-float32` in front where they quantize and the model computes in half precision."""
    quantizes = any(isinstance(item, (Calibrate, InsertQdq)) for item in pipeline)
    if not quantizes or any(isinstance(item, ToFloat32) for item in pipeline) or not computes_in_half(model.graph):
        return list(pipeline)
    place = next(number for number, item in enumerate(pipeline) if not isinstance(item, FreezeInputs))
    return [*pipeline[:place], ToFloat32(), *pipeline[place:]]


def _is_data_free(pipeline: Sequence[Pass]) -> bool:
    return any(isinstance(item, Calibrate) and item.method is Method.DATA_FREE for item in pipeline)


def check(
    reference: Source,
    other: Source,
    *,
    data: DataSource | None = None,
    preprocess: AnyPreprocess | None = None,
    samples: int | None = None,
    layers: bool = False,
    exact: bool = False,
    progress: Progress = silent,
) -> Check:
    """Compare a model with its reference: SQNR, cosine, largest error, agreement, sizes and latency.

    Args:
        reference: usually the float model; a path, a ModelProto or a gs.Graph.
        other: a model with the same inputs and outputs.
        data: what `load_samples` takes; None: made-up inputs.
        preprocess: for a folder of images, as `optimize`.
        samples: use at most this many samples.
        layers: compare the tensors that both have by name, too.
        exact: with the arithmetic that Q and DQ stand for, as TensorRT, Arm and x86 with VNNI compute, not with
            onnxruntime's int8 kernels on this CPU.
        progress: is told how far the work is.

    Raises:
        GraphoptError: a model cannot be read, or they do not fit each other or the data.
    """
    float_model, judged = load_model(reference), load_model(other)
    fitting = _samples(float_model, data, preprocess, samples)
    if fitting is None:
        fitting = made_up_samples(open_session(float_model), float_model.graph)
        fitting = fitting if samples is None else fitting.first(samples)
    return check_models(float_model, judged, fitting, layers=layers, exact=exact, progress=progress)


def lint(model: Source, target: str = "ort-cpu") -> LintReport:
    """Hold a model, quantized by any tool, against the rules of a target.

    Args:
        model: a path, a ModelProto or a gs.Graph; left as it is.
        target: a name in `graphopt.targets.targets()`.

    Raises:
        GraphoptError: the model cannot be read, or there is no such target.
    """
    judge, loaded = target_named(target), load_model(model)
    if loaded.graph.functions:
        loaded = loaded.copy()
        InlineFunctions().apply(loaded.graph, Context(frame=loaded.frame))
    return lint_model(loaded, judge)


def inspect(model: Source) -> Inspection:
    """Size, parameters, MACs, activation memory, operators and dtypes of a model.

    Where sizes are computed inside the graph and shape inference does not see through that, MACs and activation memory
    are those of the folded graph; everything else is the model's as it is.

    Raises:
        ModelError: the model cannot be read.
    """
    loaded = load_model(model)
    found = inspect_model(loaded)
    if not found.macs_unknown:
        return found
    folded = loaded.copy()
    Fold().apply(folded.graph, Context(frame=folded.frame))
    costs = inspect_model(folded)
    return replace(
        found,
        macs=costs.macs,
        macs_unknown=costs.macs_unknown,
        peak_activation_nbytes=costs.peak_activation_nbytes,
        activations_unknown=costs.activations_unknown,
        assumed_shapes=costs.assumed_shapes,
    )


def channel_groups(model: Source, *, passes: str | Sequence[Pass] = "fold") -> ChannelGroups:
    """Which channels of a model must be removed together, and which stay, with the reason.

    Args:
        model: a path, a ModelProto or a gs.Graph; never changed.
        passes: what runs before `prune` in the pipeline of `optimize`: groups are those of the model behind it.

    Raises:
        GraphoptError: the model cannot be read, or a pass refuses it.
    """
    pipeline = parse_pipeline(passes, registry()) if isinstance(passes, str) else list(passes)
    return find_groups(PassManager(pipeline, verify=False).run(model).optimized.graph)


def _samples(
    model: Model, data: DataSource | None, preprocess: AnyPreprocess | None, limit: int | None
) -> Samples | None:
    refuse_limit(limit)
    if data is None and preprocess is not None:
        raise DataError("preprocess is for a folder of images, and there are no data: name the folder (--data)")
    if data is None:
        return None
    inputs = open_session(model, optimize=False, copy_weights=False).inputs
    return load_samples(data, inputs, limit=limit, preprocess=preprocess)


def _of_model(ranges: Ranges, model: Model) -> Ranges:
    """Ranges with the name and the hash of the file that their model came from."""
    if model.path is None:
        return ranges
    return replace(ranges, model=model.path.name, model_sha256=sha256_of(model.files))


def _other_model(ranges: Ranges | None, model: Model) -> list[str]:
    """A warning where ranges were found on another file than the model's."""
    if ranges is None or not ranges.model_sha256 or model.path is None or ranges.model_sha256 == sha256_of(model.files):
        return []
    return [f"the ranges were found on another model, {ranges.model}: only tensors of the same names get one"]


def _final_check(float_model: Model, result: Result, context: Context) -> Check:
    samples = context.samples or made_up_samples(open_session(float_model), float_model.graph, seed=context.seed)
    return check_models(
        float_model,
        result.optimized,
        samples.first(CHECK_SAMPLES),
        exact=not context.target.runs_here,
        measure=context.target.runs_here,
        progress=context.progress,
    )


def _data_warnings(pipeline: Sequence[Pass], context: Context, made: Check | None) -> list[str]:
    """What a user must know of the data that ranges and figures come from."""
    if calibrates(pipeline) and (context.samples is None or _is_data_free(pipeline)):
        return [_UNCALIBRATED]
    warnings = [] if context.samples is None else list(context.samples.notes)
    if context.ranges is not None and context.ranges.synthetic:
        warnings.append("the ranges were found on made-up inputs: calibrate again with --data")
    if context.samples is None and made is not None:
        warnings.append("no --data: the result was compared with the float model on made-up inputs")
    return warnings


def _quantized(pipeline: Sequence[Pass], result: Result) -> bool:
    return any(
        isinstance(item, InsertQdq) and record.rewrites
        for item, record in zip(pipeline, result.report.passes, strict=True)
    )


def _lint_warnings(report: Report, inherited: Collection[str] = ()) -> list[str]:
    """What is wrong with a quantized result, with the advice; `inherited` rules are broken by the float model too."""
    assert report.lint is not None
    advice = "graphopt lint lists what to mend"
    warnings = [f"lint: {report.lint.verdict}; {advice}"] if report.lint.failed else []
    if inherited:
        warnings[0] += f" (the float model breaks {' and '.join(sorted(inherited))} as well)"
    if report.check is not None and report.check.is_slower:
        assert report.check.speedup is not None
        slower = f"int8 is slower than float on this machine ({1 / report.check.speedup:.2f} x the time)"
        found = report.lint.count(Severity.WARNING)
        why = (
            f"{found} operators run in float or slow int8: {advice}"
            if found
            else "keep the float model here, or let qdq:autotune=true find what pays"
        )
        warnings.append(f"{slower}: {why}")
    return warnings


def _changed_outputs(pipeline: Sequence[Pass], result: Result) -> bool:
    return any(
        item.effect is Effect.LOSSY and record.rewrites
        for item, record in zip(pipeline, result.report.passes, strict=True)
    )
