"""What a Python caller uses: `optimize`, `check` and `inspect`; the command line is a thin layer over these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graphopt.checking import Check, check_models
from graphopt.data import DataSource, load_samples, refuse_limit
from graphopt.errors import DataError
from graphopt.inspection import Inspection, inspect_model
from graphopt.made_up import made_up_samples
from graphopt.model_io import Model, Source, load_model, refuse_target
from graphopt.pass_base import Context, Effect, Pass
from graphopt.pass_manager import PassManager, Result
from graphopt.passes import Calibrate, Fold, registry
from graphopt.pipeline import parse_pipeline
from graphopt.preprocess import AnyPreprocess, Preprocess, preprocess_of
from graphopt.progress import Progress, silent
from graphopt.ranges import Ranges
from graphopt.runtime import open_session
from graphopt.targets import target_named

CHECK_SAMPLES = 64
"""Samples that the check at the end of `optimize` uses; `check` uses all that it is given."""

_UNCALIBRATED = (
    "no --data: activations were calibrated on made-up inputs, so their ranges and the figures below say little about "
    "real ones"
)


def optimize(
    model: Source,
    passes: str | Sequence[Pass],
    *,
    data: DataSource | None = None,
    preprocess: AnyPreprocess | None = None,
    samples: int | None = None,
    target: str = "ort-cpu",
    ranges: str | Path | Ranges | None = None,
    verify: bool = True,
    progress: Progress = silent,
    failure_folder: Path | None = None,
) -> Result:
    """Run a pipeline over a model; the model, its file and its data stay as they are.

    Args:
        model: a path, a ModelProto or a gs.Graph.
        passes: pipeline text such as "fold,calibrate,qdq", or passes.
        data: what `load_samples` takes; None: activations are calibrated on made-up inputs, and the report says so.
        preprocess: how a folder of images becomes arrays, as text ("resize=256:crop=224"), a TOML file or a
            `Preprocess`, which describes the keys.
        samples: use at most this many samples of `data`.
        target: a name in `graphopt.targets.TARGETS`.
        ranges: a file that `calibrate` writes, or that is read when the pipeline has no `calibrate`; or ranges.
        verify: check the model after every pass, and compare with the float model after a lossy one.
        progress: is told how far the work is.
        failure_folder: gets what reproduces the failure of a pass.

    Raises:
        GraphoptError: the model, the data or the request is wrong.
    """
    pipeline = parse_pipeline(passes, registry()) if isinstance(passes, str) else list(passes)
    manager = PassManager(pipeline, verify=verify)
    wanted = _preprocess(preprocess, data)
    context = Context(target=target_named(target), progress=progress)
    float_model = load_model(model)
    ranges_file = Path(ranges) if isinstance(ranges, str | Path) else None
    if isinstance(ranges, Ranges):
        context.ranges = ranges
    elif ranges_file is not None and calibrates(pipeline):
        refuse_target(ranges_file, overwrite=True, protect=float_model.files)
    elif ranges_file is not None:
        context.ranges = Ranges.load(ranges_file)
    refuse_limit(samples)
    if data is not None:
        context.samples = load_samples(data, open_session(float_model).inputs, limit=samples, preprocess=wanted)
    result = manager.run(float_model, context, failure_folder=failure_folder)
    if ranges_file is not None and calibrates(pipeline) and context.ranges is not None:
        context.ranges.save(ranges_file)
    if verify and _changed_outputs(pipeline, result):
        result.report.check = _final_check(float_model, result, context)
    result.report.warnings[:0] = _data_warnings(pipeline, context, result.report.check)
    return result


def calibrates(pipeline: Sequence[Pass]) -> bool:
    """Whether a pipeline finds ranges itself, and so writes a ranges file instead of reading it."""
    return any(isinstance(item, Calibrate) for item in pipeline)


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
        preprocess: how a folder of images becomes arrays, as for `optimize`.
        samples: use at most this many samples.
        layers: compare the tensors that both have by name, too.
        exact: with the arithmetic that Q and DQ stand for, as TensorRT, Arm and x86 with VNNI compute, not with
            onnxruntime's int8 kernels on this CPU.
        progress: is told how far the work is.

    Raises:
        GraphoptError: a model cannot be read, or they do not fit each other or the data.
    """
    refuse_limit(samples)
    wanted = _preprocess(preprocess, data)
    float_model, judged = load_model(reference), load_model(other)
    session = open_session(float_model)
    chosen = made_up_samples(session) if data is None else data
    fitting = load_samples(chosen, session.inputs, limit=samples, preprocess=wanted)
    return check_models(float_model, judged, fitting, layers=layers, exact=exact, progress=progress)


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


def _preprocess(request: AnyPreprocess | None, data: DataSource | None) -> Preprocess | None:
    """The request, read before the long work."""
    if request is None:
        return None
    if data is None:
        raise DataError("preprocess is for a folder of images, and there are no data: name the folder (--data)")
    return preprocess_of(request)


def _final_check(float_model: Model, result: Result, context: Context) -> Check:
    samples = context.samples or made_up_samples(open_session(float_model), seed=context.seed)
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
    if context.samples is None and calibrates(pipeline):
        return [_UNCALIBRATED]
    warnings = [] if context.samples is None else list(context.samples.notes)
    if context.ranges is not None and context.ranges.synthetic:
        warnings.append("the ranges were found on made-up inputs: calibrate again with --data")
    if context.samples is None and made is not None:
        warnings.append("no --data: the result was compared with the float model on made-up inputs")
    return warnings


def _changed_outputs(pipeline: Sequence[Pass], result: Result) -> bool:
    return any(
        item.effect is Effect.LOSSY and record.rewrites
        for item, record in zip(pipeline, result.report.passes, strict=True)
    )
