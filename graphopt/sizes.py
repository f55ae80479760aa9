"""A graph with its shapes as numbers: what MACs and memory are counted on.

Where a model leaves the sizes of its inputs open, those of `graphopt.synthetic` are assumed (batch 1, images of 224),
or else those that its weights ask for (`graphopt.required_sizes`), and shape inference carries them through. Every
figure that rests on them is given together with them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.feeds import InputSpec, fixed_size
from graphopt.graph import all_graphs, is_constant, present
from graphopt.graph_copy import copy_graph
from graphopt.opset import raise_opset
from graphopt.required_sizes import with_required_sizes
from graphopt.shapes import infer_shapes
from graphopt.synthetic import candidate_shapes

Shape = tuple[int, ...]

_FIRST_OPSET_TO_PROPAGATE_SHAPES = 15  # onnx passes values on through Shape only in its version 15 and later


def at_assumed_sizes(graph: gs.Graph, defaults: Collection[str] = ()) -> tuple[gs.Graph, dict[str, Shape]]:
    """Return a copy of `graph` with shapes inferred, and the shape of each input that it rests on.

    Of the sizes that `synthetic` would try, those are taken that leave the fewest tensors empty or of unknown
    shape. Inputs named in `defaults` keep the shape of their default value. Inputs that declare no shape at
    all are missing from the second result; what depends on them stays unknown.
    """
    candidates = candidate_sizes(graph, defaults)
    best = _sized(graph, candidates[0])
    if best.unknown:
        newer = _with_newer_opset(graph)
        for assumed in candidates:
            best = min(best, _sized(newer, assumed), key=lambda sized: sized.unknown)
            if not best.unknown:
                break
    return best.graph, best.assumed


def candidate_sizes(graph: gs.Graph, defaults: Collection[str] = ()) -> list[dict[str, Shape]]:
    """Return the shapes of the inputs by name, as `graphopt.synthetic` would try them, but of those in `defaults`."""
    specs = [
        InputSpec(each.name, numpy_dtype(each.dtype), tuple(each.shape))
        for each in graph.inputs
        if each.shape is not None and is_typed_tensor(each) and each.name not in defaults
    ]
    candidates = candidate_shapes(specs, with_required_sizes(specs, graph))
    return [dict(zip((spec.name for spec in specs), shapes, strict=True)) for shapes in candidates]


def at_sizes(graph: gs.Graph, shapes: Mapping[str, Shape] | None) -> gs.Graph:
    """Return a copy of `graph` with shapes inferred for inputs of these shapes, by name; other sizes stay open.

    None stands for sizes as `at_assumed_sizes` assumes them. Where these leave tensors of unknown shape, the copy may
    be of a newer opset; tensors keep their names.
    """
    if shapes is None:
        return at_assumed_sizes(graph)[0]
    best = _sized(graph, dict(shapes))
    if best.unknown and graph.opset < _FIRST_OPSET_TO_PROPAGATE_SHAPES:
        best = min(best, _sized(_with_newer_opset(graph), best.assumed), key=lambda sized: sized.unknown)
    return best.graph


def tensors_at(graph: gs.Graph, shapes: Mapping[str, Shape]) -> dict[str, gs.Tensor]:
    """Return copies of all tensors by name, with what shape inference finds when the inputs have these shapes."""
    sized = at_sizes(graph, shapes)
    return {tensor.name: tensor for tensor in (*sized.inputs, *_computed(sized))}


class _Sized(NamedTuple):
    graph: gs.Graph
    assumed: dict[str, Shape]
    unknown: int  # tensors


def _sized(graph: gs.Graph, assumed: dict[str, Shape]) -> _Sized:
    sized = _inferred_at(graph, assumed)
    return _Sized(sized, assumed, sum(_is_unknown(tensor) for tensor in _computed(sized)))


def _is_unknown(tensor: gs.Tensor) -> bool:
    """Whether the assumed sizes leave a tensor of unknown size, or of none because they are too small."""
    shape = fixed_shape(tensor)
    return shape is None or (0 in shape and not is_constant(tensor))


def _with_newer_opset(graph: gs.Graph) -> gs.Graph:
    """Return a copy in which shape inference follows sizes that the model computes, from Shape to Reshape."""
    newer = copy_graph(graph)
    try:
        raise_opset(newer, max(graph.opset, _FIRST_OPSET_TO_PROPAGATE_SHAPES))
    except ModelError:
        return copy_graph(graph)  # the other may be half converted
    return newer


def _inferred_at(graph: gs.Graph, shapes: Mapping[str, Shape]) -> gs.Graph:
    sized = copy_graph(graph)
    for tensor in sized.inputs:
        if tensor.name in shapes:
            tensor.shape = list(shapes[tensor.name])
    for tensor in _computed(sized):
        if fixed_shape(tensor) is None:  # the symbols in it stand for the sizes of other inputs
            tensor.shape = None
    infer_shapes(sized)
    return sized


def _computed(graph: gs.Graph) -> Iterator[gs.Tensor]:
    for each in all_graphs(graph):
        for node in each.nodes:
            yield from present(node.outputs)


def fixed_shape(tensor: gs.Tensor) -> Shape | None:
    """Return the shape, if every size is a number."""
    if tensor.shape is None:
        return None
    sizes = tuple(size if size == 0 else fixed_size(size) for size in tensor.shape)
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def nbytes(tensor: gs.Tensor) -> int | None:
    """Return the bytes that a tensor takes while the model runs; None where shape or dtype is unknown."""
    shape = fixed_shape(tensor)
    if shape is None or not is_typed_tensor(tensor):
        return None
    return math.prod(shape) * numpy_dtype(tensor.dtype).itemsize


def is_typed_tensor(tensor: gs.Tensor) -> bool:
    """Whether a value is a tensor of known dtype: no sequence, no map, no optional."""
    return bool(tensor.dtype) and getattr(tensor, "type", "tensor_type") == "tensor_type"  # 0 is ONNX's "undefined"


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype of a tensor; graphsurgeon keeps ONNX's number for types that numpy lacks."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)
