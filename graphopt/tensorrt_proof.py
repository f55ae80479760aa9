"""What TensorRT really runs in int8: each node of a graph beside the layers that TensorRT's compiler makes of it.

TensorRT for RTX builds engines for a GPU that is named, on any CPU. Its log lists the layers of the engine, the types
that each reads and the nodes of the ONNX file that it stands for. So every node gets a name of its own before the file
is handed over, and every open size of an input a number. The compiler comes with the extra `graphopt[tensorrt]`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.errors import ModelError
from graphopt.graph import all_graphs, label_of
from graphopt.model_io import Model, save_model
from graphopt.sizes import Shape, candidate_sizes

_LIBRARIES = ("onnxruntime_ep_nv_tensorrt_rtx", "libtensorrt_rtx", "libtensorrt_onnxparser_rtx")  # a package, its files
_BINDINGS = "tensorrt_rtx_bindings"  # find those libraries where they are loaded already
_GPU = "SM89"  # Ada, the newest that has int8 and float8 but no kernels of its own for either
_MARK = re.compile(r"graphopt_node_(\d+)_")
_LAYER = re.compile(
    r"^Name: .*?, LayerType: (?P<kind>\w+), (?P<reads>Inputs: .*?), (?:Constants|Outputs): (?P<rest>.*)$", re.MULTILINE
)
_QUANTIZED = re.compile(r"Datatype: (?:Int8|Int4|FP8|FP4)\b")
_GENERATED = "kgen"  # kernels of elementwise operators, casts and whatever else is fused with them
_PLACE_IN_SOURCE = re.compile(r"\[\S+::\w+::\d+\]")
_LONGEST_MESSAGE = 300  # characters


@dataclass(frozen=True)
class TensorRTProof:
    """What became of the nodes of a graph, by `id`; those in neither set are folded or part of other layers."""

    in_int8: frozenset[int]  # or in float8 and the like: a layer that stands for the node reads quantized values
    in_float: frozenset[int]


def has_compiler() -> bool:
    """Whether TensorRT's compiler is installed."""
    return all(importlib.util.find_spec(name) is not None for name in (_LIBRARIES[0], _BINDINGS))


def compiler_name() -> str:
    """The compiler and its version."""
    return f"TensorRT for RTX {_compiler().__version__}"


def prove(model: Model, input_shapes: Mapping[str, Shape] | None = None) -> TensorRTProof:
    """Build an engine of a model and see what becomes of each node; the model is left as it is.

    Args:
        model: of any tool.
        input_shapes: by name; None: open sizes are the first of those in `graphopt.synthetic` that TensorRT can build.

    Raises:
        ModelError: TensorRT refuses the model; names the sizes where it was free to choose them.

    """
    marked = model.copy()
    nodes, copies = ([node for graph in all_graphs(each.graph) for node in graph.nodes] for each in (model, marked))
    for number, node in enumerate(copies):
        node.name = f"graphopt_node_{number}_"
    try:
        candidates = candidate_sizes(marked.graph) if input_shapes is None else [input_shapes]
        layers = _layers_at_some_sizes(marked, candidates)
    except ModelError as error:
        named = _MARK.sub(lambda match: label_of(nodes[int(match[1])]), str(error))
        raise ModelError(named) from error
    kinds: dict[int, dict[str, bool]] = defaultdict(dict)  # by node: kinds of layers, and whether one reads int8
    for layer in layers:
        quantized = _QUANTIZED.search(layer["reads"]) is not None
        for number in {int(mark) for mark in _MARK.findall(layer["rest"])}:
            kinds[number][layer["kind"]] = quantized or kinds[number].get(layer["kind"], False)
    in_int8 = {number for number, found in kinds.items() if _is_int8(found)}
    return TensorRTProof(
        frozenset(id(nodes[number]) for number in in_int8),
        frozenset(id(nodes[number]) for number in kinds if number not in in_int8),
    )


def _is_int8(kinds: dict[str, bool]) -> bool:
    """Beside a product's own layer, the generated ones only scale its sums, and may read the int8 of a skip input."""
    own = [quantized for kind, quantized in kinds.items() if kind != _GENERATED]
    return any(own or kinds.values())


def _layers_at_some_sizes(model: Model, candidates: Sequence[Mapping[str, Shape]]) -> list[re.Match[str]]:
    errors: list[ModelError] = []
    for shapes in candidates:
        for tensor in model.graph.inputs:
            tensor.shape = shapes.get(tensor.name, tensor.shape)
        try:
            return _layers(model)
        except ModelError as error:
            errors.append(error)
    refusal = next((error for error in errors if not isinstance(error, _NotParsedError)), errors[0])
    if len(candidates) > 1:
        first = ", ".join(f"{name} {list(shape)}" for name, shape in candidates[0].items())
        raise ModelError(f"{refusal} (with inputs {first} and others: the model leaves sizes open)") from refusal
    raise refusal


class _NotParsedError(ModelError):
    """TensorRT does not read the file; with other sizes of the inputs it may."""


def _layers(model: Model) -> list[re.Match[str]]:
    """The layers of the engine that TensorRT builds, as its log describes them."""
    trt = _compiler()
    log = _new_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        save_model(model, file)
        parsed = parser.parse_from_file(str(file))
    if not parsed:
        error = parser.get_error(0)
        raise _NotParsedError(_one_line(f"{error.node_name()} ({error.node_operator()}): {error.desc()}"))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, _GPU), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if builder.build_serialized_network(network, config) is None:
        raise ModelError(_one_line(log.errors[0] if log.errors else "no engine was built"))
    return list(_LAYER.finditer("\n".join(log.messages)))


def _new_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]  # the module has no types
        """What TensorRT says: all of it where it lists layers, and errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif "LayerType: " in message:
                self.messages.append(message)

    return Log()


@cache
def _compiler() -> Any:
    """TensorRT's Python module, with its libraries loaded."""
    package, *names = _LIBRARIES
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations, "has_compiler() says whether it is installed"
    folder = Path(found.submodule_search_locations[0])
    for name in names:
        ctypes.CDLL(str(next(folder.glob(f"{name}.so.*"))), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(_BINDINGS)


def _one_line(text: str) -> str:
    """Return the first thing that an error says, without the places in TensorRT's source."""
    said = re.sub(r"\s*In \S+ at \S+:\d+", "", " ".join(text.split()))
    first = next(filter(None, map(str.strip, _PLACE_IN_SOURCE.split(said))), said)
    return first.replace("Invalid Node - ", "").replace("ITensor::getDimensions: ", "")[:_LONGEST_MESSAGE]
