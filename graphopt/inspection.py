"""What a model is made of, and what a run of it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import all_graphs, bodies, constants_in, is_constant, present
from graphopt.macs import count_macs
from graphopt.model_io import Model
from graphopt.node_order import sorted_nodes
from graphopt.sizes import at_assumed_sizes, is_typed_tensor, nbytes, numpy_dtype
from graphopt.stored_values import StoredTensor, nbytes_of


@dataclass(frozen=True)
class Weights:
    """The constants of one dtype."""

    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Interface:
    """An input or output as declared; None stands for a size or a shape that the model does not tell."""

    name: str
    dtype: str  # of a tensor; else what it is: sequence, optional
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model in figures; `macs` and `peak_activation_nbytes` hold for inputs of the `assumed_shapes`."""

    path: str | None
    file_nbytes: int | None  # with the files beside it that hold weights; None for a model that is no file
    weight_nbytes: int
    parameters: int  # elements of float constants and of constants that DequantizeLinear turns into floats
    macs: int  # multiply-accumulate operations of one call; what counts: graphopt.macs
    macs_unknown: int  # nodes that have MACs, but not known shapes
    peak_activation_nbytes: int  # the largest sum of tensors that are needed at one time, without the weights
    activations_unknown: int  # tensors of unknown size, which that sum leaves out
    assumed_shapes: Mapping[str, tuple[int, ...]]
    nodes: int  # nested ones too
    ops: Mapping[str, int]  # how many nodes of each operator, the most frequent first
    weight_dtypes: Mapping[str, Weights]
    opset: Mapping[str, int]  # by domain
    ir_version: int | None
    producer: str
    inputs: tuple[Interface, ...]  # without those that have a default value
    outputs: tuple[Interface, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the same as a dict of what JSON has."""
        return asdict(self)


def inspect_model(model: Model) -> Inspection:
    """Count what a model holds and costs; the model is left as it is.

    Raises:
        ModelError: its nodes need each other in a circle.

    """
    graph = model.graph
    constants = list(_constants(model))
    sized, assumed = at_assumed_sizes(graph, model.frame.defaults)
    macs = count_macs(sized)
    peak, unknown = peak_activation_nbytes(sized, model.frame.defaults)
    nodes = [node for each in all_graphs(graph) for node in each.nodes]
    return Inspection(
        path=None if model.path is None else str(model.path),
        file_nbytes=_file_nbytes(model, constants),
        weight_nbytes=sum(nbytes_of(constant._values) for constant in constants),
        parameters=_parameters(constants, nodes),
        macs=macs.total,
        macs_unknown=macs.unknown,
        peak_activation_nbytes=peak,
        activations_unknown=unknown,
        assumed_shapes=assumed,
        nodes=len(nodes),
        ops=dict(Counter(_qualified(node) for node in nodes).most_common()),
        weight_dtypes=_by_dtype(constants),
        opset={"ai.onnx": graph.opset}
        | {entry.domain: entry.version for entry in graph.import_domains or () if entry.domain},
        ir_version=graph.ir_version or None,
        producer=f"{graph.producer_name or ''} {graph.producer_version or ''}".strip(),
        inputs=tuple(_interface(each) for each in graph.inputs if each.name not in model.frame.defaults),
        outputs=tuple(map(_interface, graph.outputs)),
    )


def peak_activation_nbytes(sized: gs.Graph, defaults: Collection[str] = ()) -> tuple[int, int]:
    """Return the largest sum of live activations in bytes, and how many tensors of unknown size it misses.

    Nodes run in topological order. A tensor lives from the node that writes it, or from the start for an
    input, to the last node that reads it, or to the end for an output; while a node runs, all that it reads
    and writes is there. Constants and inputs named in `defaults` count nothing, and what a branch or body
    needs inside is left out. A runtime may reuse memory better (in place) or worse (workspace, fragments): it
    is an estimate.
    """
    nodes = [node for node in sorted_nodes(sized) if not all(map(is_constant, node.outputs))]
    last_use: dict[int, int] = {}
    for index, node in enumerate(nodes):
        last_use.update((id(tensor), index) for tensor in (*node.outputs, *_read(node)))
    last_use.update((id(tensor), len(nodes)) for tensor in sized.outputs)
    sizes = {id(tensor): nbytes(tensor) for tensor in sized.inputs if tensor.name not in defaults}
    live = peak = sum(size or 0 for size in sizes.values())
    ending: dict[int, list[int]] = {}
    for key, index in last_use.items():
        ending.setdefault(index, []).append(key)
    for index, node in enumerate(nodes):
        written = {id(tensor): nbytes(tensor) for tensor in present(node.outputs)}
        sizes |= written
        live += sum(size or 0 for size in written.values())
        peak = max(peak, live)
        live -= sum(sizes.get(key) or 0 for key in ending.get(index, ()))
    return peak, sum(size is None for size in sizes.values())


def _read(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield what a node reads, through its branches and bodies too."""
    yield from present(node.inputs)
    for body in bodies(node):
        for nested in body.nodes:
            yield from _read(nested)


def _constants(model: Model) -> Iterator[gs.Constant]:
    """Every constant once: initializers, values of Constant nodes, defaults of inputs, nested ones too."""
    yield from model.frame.defaults.values()
    yield from constants_in(model.graph)


def _file_nbytes(model: Model, constants: list[gs.Constant]) -> int | None:
    if model.path is None:
        return None
    stored = [constant._values for constant in constants]
    beside = {values.file for values in stored if isinstance(values, StoredTensor) and values.file}
    return sum(path.stat().st_size for path in (model.path, *beside))


def _parameters(constants: list[gs.Constant], nodes: list[gs.Node]) -> int:
    quantized = {id(_source(node.inputs[0])) for node in nodes if node.op == "DequantizeLinear"}
    return sum(
        math.prod(constant.shape)
        for constant in constants
        if "float" in numpy_dtype(constant.dtype).name or id(constant) in quantized
    )


def _source(tensor: gs.Tensor) -> gs.Tensor:
    """Return the constant behind the output of a Constant node; any other tensor itself."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op != "Constant":
        return tensor
    return node.attrs.get("value", tensor)


def _by_dtype(constants: list[gs.Constant]) -> dict[str, Weights]:
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for constant in constants:
        dtype = _dtype_name(constant.dtype)
        tensors[dtype] += 1
        sizes[dtype] += nbytes_of(constant._values)
    return {dtype: Weights(tensors[dtype], size) for dtype, size in sizes.most_common()}


def _qualified(node: gs.Node) -> str:
    return f"{node.domain}.{node.op}" if node.domain not in (None, "", "ai.onnx") else str(node.op)


def _interface(tensor: gs.Tensor) -> Interface:
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return Interface(tensor.name, _type_name(tensor), shape)


def _type_name(tensor: gs.Tensor) -> str:
    """Return the dtype of a tensor, or what else a value is: `sequence_type` becomes "sequence"."""
    if is_typed_tensor(tensor):
        return _dtype_name(tensor.dtype)
    kind = str(getattr(tensor, "type", "tensor_type")).removesuffix("_type")
    return "unknown" if kind == "tensor" else kind.replace("_", " ")


def _dtype_name(dtype: Any) -> str:
    found: np.dtype[Any] = numpy_dtype(dtype)
    return "string" if found.kind in "OUS" else found.name
