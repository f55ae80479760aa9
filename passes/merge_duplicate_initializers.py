"""Merge initializers that hold the same bytes: all of their readers share one.

Equal means the same type, shape and bits, so 0.0 and -0.0 differ and NaN equals itself. Only initializers of the same
type and shape are looked at: first their first bytes, then a digest of those that still agree (of 512 bits, so that
no two weights share one by chance). Weights are loaded for that one at a time and not kept; those in files beside the
model are mapped. An initializer that branches share is listed in the innermost graph that holds all of its readers, so
it does not matter where they are.

Graph inputs with default values are no initializers: a caller may override each on its own. Left alone: initializers
that are an output of a graph or that a branch returns by name, except that others may give way to them; strings and
sparse tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphopt.graph import all_graphs, named_tensors, nested_output_names, replace_uses
from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.stored_values import LENGTH_OF_START, StoredSparseTensor, StoredTensor


@dataclass(frozen=True, kw_only=True)
class MergeDuplicateInitializers(Pass):
    """Merge initializers of the same type, shape and bytes."""

    name: ClassVar[str] = "merge-duplicate-initializers"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Merge over `graph` and the graphs in it; a note says how many bytes that saves."""
        named, returned = named_tensors(graph), nested_output_names(graph)
        merged = saved = 0
        for group in _equal_groups(_initializers(graph)):
            kept = [each for each in group if id(each) in named or each.name in returned]
            representative = (kept or group)[0]
            for duplicate in group:
                if duplicate is representative or any(duplicate is each for each in kept):
                    continue
                replace_uses(duplicate, representative)
                merged += 1
                saved += duplicate._values.nbytes
        notes = (f"{saved} bytes of duplicate initializers removed",) if merged else ()
        return PassResult(rewrites=merged, notes=notes)


def _initializers(root: gs.Graph) -> Iterator[gs.Constant]:
    tensors = (tensor for graph in all_graphs(root) for node in graph.nodes for tensor in node.inputs)
    for tensor in {id(tensor): tensor for tensor in tensors if isinstance(tensor, gs.Constant)}.values():
        plain = not isinstance(tensor._values, StoredSparseTensor) and tensor._export_dtype is None
        if plain and not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype).kind not in "OSU":
            yield tensor


def _equal_groups(constants: Iterable[gs.Constant]) -> list[list[gs.Constant]]:
    """Return groups of two and more constants that are equal, in the order in which they are first read."""
    groups = [list(constants)]
    for measure in (_header, _first_bytes, _digest):
        groups = [part for group in groups for part in _split(group, measure) if len(part) > 1]
    return groups


def _split(group: list[gs.Constant], measure: Callable[[gs.Constant], Hashable]) -> Iterable[list[gs.Constant]]:
    parts: dict[Hashable, list[gs.Constant]] = {}
    for constant in group:
        parts.setdefault(measure(constant), []).append(constant)
    return parts.values()


def _header(constant: gs.Constant) -> Hashable:
    return str(constant.dtype), tuple(constant.shape)


def _first_bytes(constant: gs.Constant) -> Hashable:
    values = constant._values
    return values.start if isinstance(values, StoredTensor) else bytes(_flat(constant)[:LENGTH_OF_START])


def _digest(constant: gs.Constant) -> Hashable:
    if constant._values.nbytes <= LENGTH_OF_START:
        return b""  # what is equal so far is equal
    return hashlib.blake2b(_flat(constant).data).digest()


def _flat(constant: gs.Constant) -> NDArray[np.uint8]:
    """The bytes of a constant, which is left as lazy as it was."""
    values = constant._values
    array = values.load() if isinstance(values, LazyValues) else values
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
