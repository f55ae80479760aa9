"""Cut units out of a graph: slice its constants, and restate every size that the graph holds as data.

In ONNX, sizes are data: targets of Reshape and Expand, sizes of Split and Resize, bounds of Slice, pads, indices of
Gather, and the attributes `group`, `num_groups` and `hidden_size`. Each is computed anew from the positions that are
left. A constant with readers that need it differently becomes one for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.channel_groups import ChannelGroups, Labels, kept_positions
from graphopt.channel_moves import bounds_of, pads_of
from graphopt.cut import Cut
from graphopt.graph import (
    Names,
    all_graphs,
    constant_of,
    disconnect,
    has_input,
    is_constant,
    present,
    set_input,
)
from graphopt.graph_copy import copy_graph
from graphopt.stated_sizes import restated, stated

Kept = tuple[NDArray[np.int64] | None, ...]
Gone = NDArray[np.bool_]


def remove_units(graph: gs.Graph, groups: ChannelGroups, gone: Gone) -> Cut:
    """Remove units from a graph in place.

    Args:
        graph: what `groups` were found in, unchanged since, with shapes inferred.
        groups: of the graph.
        gone: which units to remove, bool [groups.count].

    Raises:
        ValueError: an axis would be empty.
    """
    original = copy_graph(graph)
    kept = {name: found for name, axes in groups.axes.items() if (found := _kept(axes, gone)) is not None}
    for name, axes in kept.items():
        if any(axis is not None and not len(axis) for axis in axes):
            raise ValueError(f"an axis of {name} would be empty")
    cutting = _Cutting(graph, groups, gone, kept)
    cutting.restate_sizes()
    cutting.slice_constants()
    cutting.resize()
    return Cut(original, cutting.recorded)


def composed(first: Cut, second: Cut) -> Cut:
    """The cut that two make, one after the other."""
    kept: dict[str, Kept] = dict(first.kept)
    for name, axes in second.kept.items():
        before = kept.get(name, (None,) * len(axes))
        kept[name] = tuple(
            new if old is None else old if new is None else old[new] for old, new in zip(before, axes, strict=True)
        )
    return Cut(first.original, kept)


def _kept(axes: Labels, gone: Gone) -> Kept | None:
    found = tuple(kept_positions(labels, gone) for labels in axes)
    return None if all(each is None for each in found) else found


class _Cutting:
    def __init__(self, graph: gs.Graph, groups: ChannelGroups, gone: Gone, kept: Mapping[str, Kept]) -> None:
        self.graph = graph
        self.names = Names(graph)
        self.groups = groups
        self.gone = gone
        self.kept = kept
        self.recorded: dict[str, Kept] = {}

    def along(self, tensor: gs.Tensor, axis: int) -> NDArray[np.int64] | None:
        """The positions of an axis of a tensor that stay; None: all."""
        axes = self.kept.get(tensor.name)
        return None if axes is None else axes[axis]

    def restate_sizes(self) -> None:
        """Change what nodes hold of sizes; they still read what they did before."""
        for node in list(self.graph.nodes):
            restate = None if node.domain not in (None, "", "ai.onnx") else _RESTATE.get(node.op)
            if restate is not None and any(t.name in self.kept for t in (*node.inputs, *node.outputs)):
                restate(self, node)

    def slice_constants(self) -> None:
        """Take the positions that stay out of each constant."""
        bodies = [each for each in all_graphs(self.graph) if each is not self.graph]
        whole = {id(tensor) for each in bodies for node in each.nodes for tensor in node.inputs}
        whole |= {id(tensor) for tensor in self.graph.outputs}
        readers: dict[int, list[tuple[gs.Node, int, Kept | None]]] = {}
        tensors: dict[int, gs.Tensor] = {}
        for node in self.graph.nodes:
            name = next((tensor.name for tensor in present(node.outputs)), "")
            for index, tensor in enumerate(node.inputs):
                if tensor.name and is_constant(tensor):
                    labels = self.groups.uses.get((name, index))
                    kept = self.kept.get(tensor.name) if labels is None else _kept(labels, self.gone)
                    readers.setdefault(id(tensor), []).append((node, index, kept))
                    tensors[id(tensor)] = tensor
        for key, reads in readers.items():
            if any(kept is not None for _, _, kept in reads):
                self._slice(tensors[key], reads, is_read_whole=key in whole)

    def _slice(
        self, tensor: gs.Tensor, reads: Sequence[tuple[gs.Node, int, Kept | None]], *, is_read_whole: bool
    ) -> None:
        value = constant_of(tensor)
        assert value is not None, "only constants are sliced"
        forms: dict[tuple[bytes | None, ...], list[tuple[gs.Node, int, Kept | None]]] = {}
        for read in reads:
            forms.setdefault(_key(read[2]), []).append(read)
        if len(forms) == 1 and isinstance(tensor, gs.Constant) and not is_read_whole:
            kept = reads[0][2]
            tensor.values = _taken(value, kept)
            self._record(tensor.name, kept)
            return
        for form in forms.values():
            kept = form[0][2]
            if kept is None:
                continue
            copy = gs.Constant(self.names.fresh(tensor.name), _taken(value, kept))
            self._record(copy.name, kept)
            for node, index, _ in form:
                set_input(node, index, copy)

    def _record(self, name: str, kept: Kept | None) -> None:
        if kept is not None:
            self.recorded[name] = kept

    def resize(self) -> None:
        """State the new shapes of what nodes compute; sizes that were open stay open."""
        for node in self.graph.nodes:
            for tensor in present(node.outputs):
                kept = self.kept.get(tensor.name)
                if kept is None or is_constant(tensor):
                    continue
                shape = list(tensor.shape) if tensor.shape is not None else [None] * len(kept)
                known: list[NDArray[np.int64] | None] = list(kept)
                for axis, positions in enumerate(kept):
                    if positions is not None and isinstance(shape[axis], int):
                        shape[axis] = len(positions)
                    elif positions is not None:
                        known[axis] = None
                if tensor.shape is not None:
                    tensor.shape = shape
                self._record(tensor.name, tuple(known))


def _key(kept: Kept | None) -> tuple[bytes | None, ...]:
    return () if kept is None else tuple(None if axis is None else axis.tobytes() for axis in kept)


def _taken(value: NDArray[np.generic], kept: Kept | None) -> NDArray[np.generic]:
    for axis, positions in enumerate(kept or ()):
        if positions is not None:
            value = value.take(positions, axis=axis)
    return np.ascontiguousarray(value)


def _restate_target(cutting: _Cutting, node: gs.Node, index: int) -> None:
    """Reshape, Expand, ConstantOfShape and Resize: the sizes of the result, of which only numbers need a change."""
    output = node.outputs[0]
    kept = cutting.kept.get(output.name)
    entries = stated(node.inputs[index]) if has_input(node, index) else None
    if entries is None:
        return
    changes: dict[int, int] = {}
    rank = len(kept) if kept is not None else len(entries)
    for place, entry in enumerate(entries):
        positions = None if kept is None else kept[place + rank - len(entries)]
        if isinstance(entry, int) and entry > 0 and positions is not None and len(positions) != entry:
            changes[place] = len(positions)
        elif entry == 0 and node.op == "Reshape":  # as in the input, where that axis may be another one
            size = _new_size(cutting, output, place)
            if size is not None and size != _new_size(cutting, node.inputs[0], place):
                changes[place] = size
    if changes:
        set_input(node, index, restated(node.inputs[index], changes, cutting.graph, cutting.names))


def _new_size(cutting: _Cutting, tensor: gs.Tensor, axis: int) -> int | None:
    positions = cutting.along(tensor, axis) if tensor.name in cutting.kept else None
    if positions is not None:
        return len(positions)
    size = tensor.shape[axis] if tensor.shape is not None and axis < len(tensor.shape) else None
    return size if isinstance(size, int) else None


def _reshape(cutting: _Cutting, node: gs.Node) -> None:
    if has_input(node, 1):
        _restate_target(cutting, node, 1)
        return
    target = list(node.attrs["shape"])  # opset < 5
    for axis, positions in enumerate(cutting.kept.get(node.outputs[0].name, ())):
        if positions is not None and target[axis] > 0:
            target[axis] = len(positions)
    node.attrs["shape"] = target


def _split(cutting: _Cutting, node: gs.Node) -> None:
    data = node.inputs[0]
    axes = cutting.kept.get(data.name)
    along = node.attrs.get("axis", 0)
    if axes is None or axes[along % len(axes)] is None:
        return
    along %= len(axes)
    labels = cutting.groups.axes[data.name]
    sizes, offset = [], 0
    for output in node.outputs:
        size = _old_size(cutting, output, along)
        positions = axes[along]
        assert positions is not None and labels[along] is not None
        sizes.append(int(((positions >= offset) & (positions < offset + size)).sum()))
        offset += size
    if "split" in node.attrs or (cutting.graph.opset or 13) < 13:
        node.attrs["split"] = sizes
        return
    node.attrs.pop("num_outputs", None)
    constant = gs.Constant(cutting.names.fresh(f"{node.outputs[0].name}/split"), np.array(sizes, np.int64))
    _put(node, 1, constant)


def _old_size(cutting: _Cutting, tensor: gs.Tensor, axis: int) -> int:
    axes = cutting.groups.axes.get(tensor.name)
    labels = None if axes is None else axes[axis]
    return int(labels.shape[1]) if labels is not None else int(tensor.shape[axis])


def _put(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    set_input(node, index, tensor)


def _slice(cutting: _Cutting, node: gs.Node) -> None:
    """A Slice takes a range of what is left; what one with steps leaves uneven becomes a Gather."""
    data = node.inputs[0]
    axes = cutting.kept.get(data.name)
    bounds = bounds_of(node, len(axes)) if axes is not None else None
    if axes is None or bounds is None:
        return
    changed = {}
    for axis, taken in bounds.items():
        positions = axes[axis]
        if positions is None:
            continue
        labels = cutting.groups.axes[data.name][axis]
        assert labels is not None
        selected = np.arange(labels.shape[1])[taken]
        places = np.searchsorted(positions, selected[np.isin(selected, positions)])
        changed[axis] = places
    if len(bounds) == 1 and any(not _are_even(places) for places in changed.values()):
        ((axis, places),) = changed.items()
        _become_gather(cutting, node, axis, places)
    elif changed:
        _restate_slice(cutting, node, {**bounds, **{axis: _as_slice(places) for axis, places in changed.items()}})


def _restate_slice(cutting: _Cutting, node: gs.Node, bounds: Mapping[int, slice]) -> None:
    values = {
        "starts": [taken.start for taken in bounds.values()],
        "ends": [-(2**31) if taken.stop is None else taken.stop for taken in bounds.values()],
        "axes": list(bounds),
        "steps": [taken.step or 1 for taken in bounds.values()],
    }
    if "starts" in node.attrs:
        node.attrs.update({name: values[name] for name in ("starts", "ends", "axes")})
        return
    for index, (name, numbers) in enumerate(values.items(), start=1):
        constant = gs.Constant(cutting.names.fresh(f"{node.outputs[0].name}/{name}"), np.array(numbers, np.int64))
        _put(node, index, constant)


def _become_gather(cutting: _Cutting, node: gs.Node, axis: int, places: NDArray[np.int64]) -> None:
    data, output = node.inputs[0], node.outputs[0]
    disconnect(node)
    indices = gs.Constant(cutting.names.fresh(f"{output.name}/indices"), places)
    node.op, node.attrs = "Gather", {"axis": axis}
    node.inputs.extend([data, indices])
    node.outputs.append(output)


def _are_even(places: NDArray[np.int64]) -> bool:
    return len(np.unique(np.diff(places))) < 2


def _as_slice(places: NDArray[np.int64]) -> slice:
    """The slice that takes evenly spaced places."""
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    end = int(places[-1]) + step
    return slice(int(places[0]), None if end < 0 else end, step)


def _gather(cutting: _Cutting, node: gs.Node) -> None:
    axes, indices = cutting.kept.get(node.inputs[0].name), constant_of(node.inputs[1])
    along = node.attrs.get("axis", 0)
    positions = axes[along % len(axes)] if axes is not None else None
    if positions is None or indices is None:
        return
    labels = cutting.groups.axes[node.inputs[0].name][along % len(axes or ())]
    assert labels is not None
    wanted = indices % labels.shape[1]
    wanted = wanted[np.isin(wanted, positions)] if wanted.ndim == 1 else wanted
    new = np.searchsorted(positions, wanted).astype(indices.dtype)
    set_input(node, 1, gs.Constant(cutting.names.fresh(f"{node.outputs[0].name}/indices"), np.asarray(new)))


def _pad(cutting: _Cutting, node: gs.Node) -> None:
    axes = cutting.kept.get(node.outputs[0].name)
    pads = pads_of(node, len(axes)) if axes is not None else None
    if axes is None or pads is None:
        return
    new = []
    for axis, (begin, end) in enumerate(pads):
        positions, size = axes[axis], _old_size(cutting, node.outputs[0], axis) if axes[axis] is not None else 0
        if positions is None:
            new.append((begin, end))
        else:
            new.append((int((positions < begin).sum()), int((positions >= size - end).sum())))
    if new == pads:
        return
    numbers = [begin for begin, _ in new] + [end for _, end in new]
    if "pads" in node.attrs:
        node.attrs["pads"] = numbers
        return
    name = cutting.names.fresh(f"{node.outputs[0].name}/pads")
    _put(node, 1, gs.Constant(name, np.array(numbers, np.int64)))
    if has_input(node, 3):
        every = gs.Constant(cutting.names.fresh(f"{node.outputs[0].name}/axes"), np.arange(len(new)))
        _put(node, 3, every)


def _conv(cutting: _Cutting, node: gs.Node) -> None:
    if node.attrs.get("group", 1) > 1:
        channels, each = (_left(cutting, tensor, 1) for tensor in node.inputs[:2])
        node.attrs["group"] = channels // each


def _conv_transpose(cutting: _Cutting, node: gs.Node) -> None:
    if node.attrs.get("group", 1) > 1:
        node.attrs["group"] = _left(cutting, node.outputs[0], 1) // _left(cutting, node.inputs[1], 1)


def _left(cutting: _Cutting, tensor: gs.Tensor, axis: int) -> int:
    """How many positions of an axis of known size are left."""
    positions = cutting.along(tensor, axis)
    return int(tensor.shape[axis]) if positions is None else len(positions)


def _group_norm(cutting: _Cutting, node: gs.Node) -> None:
    positions = cutting.along(node.inputs[0], 1)
    if positions is not None:
        in_group = _old_size(cutting, node.inputs[0], 1) // int(node.attrs["num_groups"])
        node.attrs["num_groups"] = len(np.unique(positions // in_group))


def _recurrent(cutting: _Cutting, node: gs.Node) -> None:
    node.attrs["hidden_size"] = _left(cutting, node.inputs[2], 2)


_RESTATE: dict[str, Callable[[_Cutting, gs.Node], None]] = {
    "ConstantOfShape": lambda cutting, node: _restate_target(cutting, node, 0),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Expand": lambda cutting, node: _restate_target(cutting, node, 1),
    "GRU": _recurrent,
    "Gather": _gather,
    "GroupNormalization": _group_norm,
    "LSTM": _recurrent,
    "Pad": _pad,
    "RNN": _recurrent,
    "Reshape": _reshape,
    "Resize": lambda cutting, node: _restate_target(cutting, node, 3),
    "Slice": _slice,
    "Split": _split,
}
