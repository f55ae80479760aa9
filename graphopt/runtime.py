"""onnxruntime sessions: open one for a model of any size, run it, count its operators, time it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from graphopt.errors import DataError, GraphoptError, ModelError
from graphopt.feeds import Feed, InputSpec
from graphopt.model_io import Model, fits_one_file, load_model
from graphopt.moved_reads import PROPAGATION, moved_read
from graphopt.operators import RANDOM
from graphopt.protobuf import all_graph_protos, without
from graphopt.weight_sharing import share_weights

Array = NDArray[Any]
Runnable = Model | onnx.ModelProto | Path
Result = TypeVar("Result")

_LEAST_SHARED = 2**20  # bytes of weights from which on they are handed over beside the model, not copied into it
_SPINNING = 1000  # us in which threads wait for the next operator awake; by default they go on for 50 ms after a run
_SETTLING = 0.01  # seconds after which a session runs as if there were no others
_LEAST_FED = 2**28  # bytes of weights from which on onnxruntime's own copy is avoided where speed does not count
_SHOW_NOTHING = 4  # of onnxruntime's log severities: fatal errors only; all others come as exceptions
_WRONG_BEFORE_FLOAT8 = "ReluQuantRewrite;ClipQuantRewrite"  # 1.32 takes a Q of float8 for one that a Relu is lost in
_REFUSED_BY = {  # optimizers of 1.32 that stumble over a model that onnxruntime runs without them, by what they say
    "Unexpected data type for QuantizeLinear input y_zero_point": "ClipQuantRewrite",  # float8 behind a Clip
    "output_dtype INT8 does not match y_zero_point type UINT8": "QDQS8ToU8Transformer",  # Qs of opset 21 that moved
}
_ORT_ERRORS: tuple[type[Exception], ...] = (
    *(each for each in vars(ort_errors).values() if isinstance(each, type) and issubclass(each, Exception)),
    RuntimeError,
    ValueError,
)
_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "string": np.dtype(object),
}


class Session:
    """A model that is ready to run on the CPU.

    Attributes:
        inputs: what each required input takes; inputs with a default value are left out.
        outputs: the names of the outputs, extra ones last.

    """

    def __init__(self, session: ort.InferenceSession, weights: Mapping[str, ort.OrtValue]) -> None:
        inputs = session.get_inputs()
        self._session = session
        self._weights = weights  # kept: the session may read them in place
        self._fed = {each.name: weights[each.name] for each in inputs if each.name in weights}
        self._takes = {each.name for each in (*inputs, *session.get_overridable_initializers())}
        self.inputs = tuple(_input_spec(each) for each in inputs if each.name not in weights)
        self.outputs = tuple(output.name for output in session.get_outputs())

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once and return the named outputs, by default all of them.

        A tensor is an array; for what a sequence, a map and an optional are, see `arrays_in`. What the feed has besides
        the model's inputs is left out: another model may take more.

        Raises:
            DataError: the feed lacks an input, or has one that the model does not take.
            ModelError: the model fails on it.

        """
        names = self._names(feed, outputs)
        fed = self._taken(feed) | self._fed
        results = _with_our_errors(lambda: self._session.run(names, fed), bad_argument=DataError)
        return dict(zip(names, results, strict=True))

    def run_without_copies(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once; as `run`, but arrays are read-only views of onnxruntime's own memory, which lives as long as they.

        `run` copies each output into fresh memory, which can take longer than the model where many are asked for.
        """
        names = self._names(feed, outputs)

        def values() -> list[Any]:
            inputs = {
                name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
                for name, array in self._taken(feed).items()
            }
            return [_view(value) for value in self._session.run_with_ort_values(names, {**inputs, **self._fed})]

        return dict(zip(names, _with_our_errors(values, bad_argument=DataError), strict=True))

    def _taken(self, feed: Feed) -> dict[str, Any]:
        return {name: array for name, array in feed.items() if name in self._takes}

    def _names(self, feed: Feed, outputs: Sequence[str] | None) -> list[str]:
        missing = [spec.name for spec in self.inputs if spec.name not in feed]
        if missing:
            raise DataError(f"the feed has no {missing[0]!r}, which the model needs; it has {sorted(feed)}")
        return list(self.outputs if outputs is None else outputs)


def open_session(
    model: Runnable,
    *,
    threads: int = 0,
    optimize: bool = True,
    exact: bool = False,
    extra_outputs: Sequence[str] = (),
    copy_weights: bool = True,
    plan_memory: bool = True,
) -> Session:
    """Open a session on the CPU.

    Args:
        model: what to run; the weights of a Model of 1 MB and more are handed over beside it, not in a protobuf, so
            that it may pass 2 GB. onnxruntime copies them once.
        threads: how many threads one operator may use; 0 leaves that to onnxruntime.
        optimize: whether onnxruntime may rewrite the graph, at its highest level.
        exact: whether Q and DQ are computed as they stand, whatever int8 kernels this machine has. The rest is
            optimized, and weights are dequantized once: up to 19 times faster than without any optimization.
        extra_outputs: tensors of the main graph to return as outputs too.
        copy_weights: whether onnxruntime may copy the weights, packed for its kernels. If not, it reads those of a
            model of 256 MB and more where they are, as inputs, and rewrites nothing: slower, in half the memory.
        plan_memory: whether each run takes one block for all its tensors, which stays until the last of them is freed.

    Raises:
        ModelError: onnxruntime refuses the model, or it has no tensor of a name in `extra_outputs`.

    """
    if not copy_weights and isinstance(model, Model) and model.nbytes >= _LEAST_FED:
        return _open_with_weights_as_inputs(model, _options(threads, optimize=False), extra_outputs)
    options = _options(threads, optimize)
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("optimization.disable_specified_optimizers", _WRONG_BEFORE_FLOAT8)
    options.enable_mem_pattern = plan_memory
    return _open(model, options, extra_outputs)


def release_free_memory(*, collect: bool = True) -> None:
    """Give memory back to the system that is not used any more: what passes and the opening of sessions leave.

    Has the C library (glibc) return what it keeps, after a collection of garbage, which `rare_collections` puts off.
    Passes leave cycles; the opening of a session leaves none, and can do without one.
    """
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def arrays_in(output: Any) -> list[Array]:
    """Return the arrays that an output holds, whatever its ONNX type.

    A tensor holds itself, a sequence what its elements hold, a map its keys and its values, an optional its
    value or nothing.
    """
    if output is None:
        return []
    if isinstance(output, Mapping):
        return [np.asarray(list(output)), np.asarray(list(output.values()))]
    if isinstance(output, list):
        return [array for element in output for array in arrays_in(element)]
    return [np.asarray(output)]


def optimized_ops(model: Runnable) -> Counter[str]:
    """Count the operators that are left after onnxruntime's own optimization, nested graphs included.

    Raises:
        ModelError: onnxruntime refuses the model.

    """
    return Counter(node.op_type for graph in all_graph_protos(optimized_graph(model)) for node in graph.node)


def optimized_graph(model: Runnable, *, layouts: bool = True) -> onnx.GraphProto:
    """Return what onnxruntime's own optimization makes of a graph; larger weights are left in files that are gone.

    Without `layouts`, the last level is left out. It fuses no operators, but moves them to other layouts of memory,
    which changes their names.

    Raises:
        ModelError: onnxruntime refuses the model.

    """
    with tempfile.TemporaryDirectory() as folder:
        options = _options(threads=0, optimize=True)
        if not layouts:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        # onnxruntime's own file of weights keeps the model file small, whatever the model's size
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        _open(model, options, (), by_default=True)
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return optimized.graph


def measure_latency(
    sessions: Sequence[Session], feed: Feed, *, seconds: float = 2.0, least_runs: int = 3
) -> list[float]:
    """Measure how long one run of each session takes, as the median in seconds.

    The sessions take turns, in an order that is reversed every other round, so that a machine that slows
    down or speeds up meanwhile does so for all of them. In a turn, runs count only after 10 ms of others: until then
    another model's weights are in the caches, and the threads of its session are awake in wait for its next run.

    Args:
        sessions: what to compare.
        feed: the inputs, the same for all.
        seconds: how long to measure all together, beyond a first run of each.
        least_runs: how many turns to give each session even if that takes longer.

    """
    for session in sessions:
        session.run(feed)
    durations: list[list[float]] = [[] for _ in sessions]
    turns = list(zip(sessions, durations, strict=True))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_runs or time.perf_counter() < end:
        for session, measured in turns if rounds % 2 == 0 else reversed(turns):
            _run_for(_SETTLING, session, feed)
            measured += _run_for(_SETTLING, session, feed)
        rounds += 1
    return [statistics.median(measured) for measured in durations]


def _run_for(seconds: float, session: Session, feed: Feed) -> list[float]:
    """Run for so long, at least once; how long each run took, in seconds."""
    durations: list[float] = []
    while sum(durations) < seconds:
        start = time.perf_counter()
        session.run(feed)
        durations.append(time.perf_counter() - start)
    return durations


def _options(threads: int, optimize: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _SHOW_NOTHING
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPINNING))
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return options


def _open(
    model: Runnable, options: ort.SessionOptions, extra_outputs: Sequence[str], *, by_default: bool = False
) -> Session:
    """Open a session; `by_default`, as it opens for everybody, or else without an optimizer that stumbles."""
    if isinstance(model, Path) and not extra_outputs:
        if not model.is_file():
            raise ModelError(f"{model}: no such file")
        return _session(str(model), options, {}, by_default=by_default)
    if isinstance(model, Path) or (isinstance(model, onnx.ModelProto) and not fits_one_file(model)):
        model = load_model(model)
    weights: dict[str, ort.OrtValue] = {}
    if isinstance(model, onnx.ModelProto):
        proto = without(model) if extra_outputs else model
    elif model.nbytes < _LEAST_SHARED:
        proto = model.to_proto()
    else:
        proto, weights = share_weights(model)
        options.add_external_initializers(list(weights), list(weights.values()))
    if isinstance(model, Model):
        _settle_seeds(proto)
    _add_outputs(proto, extra_outputs)
    disabled = []
    if (name := moved_read(proto.graph)) is not None:
        if by_default:
            raise ModelError(
                f"onnxruntime would end the process: it cannot load a model that moves {name} behind its "
                "DequantizeLinear and reads it inside a branch or body; put a Q/DQ pair behind what moves it"
            )
        disabled = [PROPAGATION]
    return _session(proto.SerializeToString(), options, weights, disabled, by_default=by_default)


def _open_with_weights_as_inputs(model: Model, options: ort.SessionOptions, extra_outputs: Sequence[str]) -> Session:
    options.enable_cpu_mem_arena = False  # it would keep what a run has needed
    proto, weights = share_weights(model)
    _settle_seeds(proto)
    listed = {each.name for each in proto.graph.input}  # before IR 4, all initializers are
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in weights]
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in proto.graph.initializer
        if tensor.name in weights and tensor.name not in listed
    )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    _add_outputs(proto, extra_outputs)
    return _session(proto.SerializeToString(), options, weights)


def _session(
    source: str | bytes,
    options: ort.SessionOptions,
    weights: Mapping[str, ort.OrtValue],
    disabled: Sequence[str] = (),
    *,
    by_default: bool = False,
) -> Session:
    def create(disabled: Sequence[str]) -> ort.InferenceSession:
        providers = ["CPUExecutionProvider"]
        return ort.InferenceSession(source, options, providers=providers, disabled_optimizers=disabled)

    try:
        return Session(_with_our_errors(lambda: create(disabled)), weights)
    except ModelError as error:
        stumbling = [optimizer for message, optimizer in _REFUSED_BY.items() if message in str(error)]
        if by_default or not stumbling:
            raise
    return Session(_with_our_errors(lambda: create([*disabled, *stumbling])), weights)


def _settle_seeds(proto: onnx.ModelProto) -> None:
    """Give random operators without a seed one that follows from their names: rewritten models compare that have them.

    onnxruntime would number seeds by the places of operators in the graph.
    """
    for node in (node for graph in all_graph_protos(proto.graph) for node in graph.node):
        if node.op_type in RANDOM and not any(each.name == "seed" for each in node.attribute):
            seed = zlib.crc32(node.output[0].encode()) % 2**16
            node.attribute.append(
                onnx.helper.make_attribute("seed", seed if node.op_type == "Dropout" else float(seed))
            )


def _add_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """List tensors as outputs, without a type: onnxruntime infers it, and a stated one might be wrong."""
    graph = proto.graph
    present = {name for node in graph.node for name in node.output}
    present.update(each.name for each in (*graph.input, *graph.initializer))
    outputs = {output.name for output in graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            raise ModelError(f"the model's main graph has no tensor {name!r}")
        if name not in outputs:
            graph.output.add(name=name)


_VIEWED_TYPES = {"tensor(float)", "tensor(double)", "tensor(float16)"}


def _view(value: ort.OrtValue) -> Any:
    """A float tensor without a copy, anything else as onnxruntime converts it; None where there is no value."""
    if not value.has_value():
        return None
    can_view = value.data_type() in _VIEWED_TYPES and hasattr(value, "__dlpack__")  # older versions only copy
    return np.from_dlpack(value) if can_view else value.numpy()


def _input_spec(argument: ort.NodeArg) -> InputSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", argument.type)
    if match is None:
        raise ModelError(f"input {argument.name!r} is of the type {argument.type}; only tensors can be fed")
    return InputSpec(argument.name, _dtype(match[1]), tuple(argument.shape))


def _dtype(name: str) -> np.dtype[Any]:
    if name in _DTYPES:
        return _DTYPES[name]
    return onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(name.upper()))


def _with_our_errors(action: Callable[[], Result], bad_argument: type[GraphoptError] = ModelError) -> Result:
    try:
        return action()
    except ort_errors.InvalidArgument as error:
        raise bad_argument(_one_line(error)) from error
    except _ORT_ERRORS as error:
        raise ModelError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """Return what onnxruntime says, without its codes and the places in its source."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", "", str(error))
    text = re.sub(r"\S*\.(?:cc|h|hpp|cpp):\d+ [^()]*\([^()]*\)", "", text)
    text = text.replace("Please fix either the inputs/outputs or the model.", "")
    return f"onnxruntime: {' '.join(text.split())[:400]}"
