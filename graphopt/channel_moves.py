"""Rules of operators that move elements: which positions of an output come from which of an input.

Reshape and what can be written with it (Flatten, DepthToSpace) work on groups of axes that fold into one another:
[N, C, H, W] -> [N, C*H*W] is N -> N and C, H, W -> C*H*W. The others work on one axis, and run themselves on its
positions: those of x[1:9:2] are positions[1:9:2].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.channel_flow import Flow, Unclear, positions
from graphopt.graph import constant_of, has_input, integers_of, is_constant, label_of
from graphopt.stated_sizes import SizeOf, stated
from graphopt.units import Axis

Rule = Callable[[Flow, gs.Node], None]


def reshaped(flow: Flow, axes: Sequence[Axis], sizes: Sequence[int], node: gs.Node) -> list[Axis]:
    """The axes of a tensor after a reshape to `sizes`."""
    result = [Axis(1)] * len(sizes)
    reason = f"{node.op} {label_of(node)} mixes them with others"
    before = [axis for axis in axes if axis.size > 1]
    after = [place for place, size in enumerate(sizes) if size > 1]
    while before and after:
        sources, targets = [before.pop(0)], [after.pop(0)]
        while (have := math.prod(axis.size for axis in sources)) != (
            want := math.prod(sizes[each] for each in targets)
        ):
            if not (before if have < want else after):
                raise Unclear("it has other sizes than its input")
            if have < want:
                sources.append(before.pop(0))
            else:
                targets.append(after.pop(0))
        joined = sources[0] if len(sources) == 1 else flow.units.join(sources)
        parts = [joined] if len(targets) == 1 else flow.units.split(joined, [sizes[each] for each in targets], reason)
        for place, axis in zip(targets, parts, strict=True):
            result[place] = axis
    return result


def _reshape(flow: Flow, node: gs.Node) -> None:
    axes = reshaped(flow, flow.input(node, 0), flow.shape(node.outputs[0]), node)
    flow.give(node, 0, flow.follow_sizes(node, 1, axes) if has_input(node, 1) else axes)


def _flatten(flow: Flow, node: gs.Node) -> None:
    flow.give(node, 0, reshaped(flow, flow.input(node, 0), flow.shape(node.outputs[0]), node))


def _transpose(flow: Flow, node: gs.Node) -> None:
    axes = flow.input(node, 0)
    order = node.attrs.get("perm", range(len(axes))[::-1])
    flow.give(node, 0, [axes[place] for place in order])


def _squeeze(flow: Flow, node: gs.Node) -> None:
    axes = flow.input(node, 0)
    stated_axes = axes_of(node)
    gone = {place % len(axes) for place in stated_axes} if stated_axes else _ones(axes)
    flow.give(node, 0, [axis for place, axis in enumerate(axes) if place not in gone])


def _unsqueeze(flow: Flow, node: gs.Node) -> None:
    axes = iter(flow.input(node, 0))
    rank = len(flow.shape(node.outputs[0]))
    new = {place % rank for place in axes_of(node) or ()}
    flow.give(node, 0, [Axis(1) if place in new else next(axes) for place in range(rank)])


def _ones(axes: Sequence[Axis]) -> set[int]:
    return {place for place, axis in enumerate(axes) if axis.size == 1}


def axes_of(node: gs.Node) -> list[int] | None:
    """The axes that a node names, in an attribute or in its second input; None where it names none.

    Raises:
        Unclear: they are computed when the model runs.
    """
    if has_input(node, 1):
        found = integers_of(node, 1)
        if found is None:
            raise Unclear("it computes its axes when it runs")
        return found
    axes = node.attrs.get("axes")
    return None if axes is None else list(axes)


def _concat(flow: Flow, node: gs.Node) -> None:
    operands = [flow.input(node, index) for index in range(len(node.inputs))]
    along = node.attrs["axis"] % len(operands[0])
    axes = [
        flow.units.concatenate([axes[place] for axes in operands])
        if place == along
        else flow.align(*(axes[place] for axes in operands))
        for place in range(len(operands[0]))
    ]
    flow.give(node, 0, axes)


def _split(flow: Flow, node: gs.Node) -> None:
    axes = flow.input(node, 0)
    along = node.attrs.get("axis", 0) % len(axes)
    offset = 0
    for index, tensor in enumerate(node.outputs):
        size = flow.shape(tensor)[along]
        part = flow.units.take(axes[along], positions(axes[along].size)[offset : offset + size])
        flow.give(node, index, [*axes[:along], part, *axes[along + 1 :]])
        offset += size
    if has_input(node, 1) and not is_constant(node.inputs[1]):
        flow.hold(axes[along], node, "computes its sizes when it runs")


def bounds_of(node: gs.Node, rank: int) -> dict[int, slice] | None:
    """What a Slice takes along each axis; None where that is computed when the model runs."""
    if "starts" in node.attrs:  # opset < 10
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes"), None
    else:
        starts, ends = integers_of(node, 1), integers_of(node, 2)
        axes, steps = integers_of(node, 3), integers_of(node, 4)
        if starts is None or ends is None or (has_input(node, 3) and axes is None):
            return None
        if has_input(node, 4) and steps is None:
            return None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return {
        axis % rank: _slice_like_python(start, end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }


def _slice_like_python(start: int, end: int, step: int) -> slice:
    """ONNX says "to the first element, included" with an end far below zero, Python with None."""
    return slice(start, None if step < 0 and end < -(2**30) else end, step)


def _slice(flow: Flow, node: gs.Node) -> None:
    axes = list(flow.input(node, 0))
    bounds = bounds_of(node, len(axes))
    shape = flow.shape(node.outputs[0])
    if bounds is None:
        open_axes = set(range(len(axes)))
        named = integers_of(node, 3)
        open_axes = open_axes if named is None else {axis % len(axes) for axis in named}
        for place in open_axes:
            flow.hold(axes[place], node, "computes its bounds when it runs")
            axes[place] = Axis(shape[place], fixed=f"{label_of(node)} slices them")
    for place, taken in (bounds or {}).items():
        if axes[place].columns and len(bounds or ()) > 1 and abs(taken.step) > 1:
            flow.hold(axes[place], node, "takes every so many of them, and slices other axes too")
            axes[place] = Axis(shape[place], fixed=f"{label_of(node)} takes every so many")
        elif axes[place].columns:
            axes[place] = flow.units.take(axes[place], positions(axes[place].size)[taken])
        else:
            axes[place] = Axis(shape[place], fixed=axes[place].fixed)
    flow.give(node, 0, axes)


def _gather(flow: Flow, node: gs.Node) -> None:
    axes, index_axes = flow.input(node, 0), flow.input(node, 1)
    along = node.attrs.get("axis", 0) % len(axes)
    indices = constant_of(node.inputs[1])
    if indices is None:
        flow.hold(axes[along], node, "chooses among them when it runs")
        picked = [flow.hold(axis, node, "takes them as indices") for axis in index_axes]
    elif indices.ndim == 1:
        picked = [flow.units.take(axes[along], indices.astype(np.int64))]
    else:
        taken = flow.units.take(axes[along], indices.astype(np.int64).reshape(-1))
        flow.hold(taken, node, "takes single ones of them")
        picked = [Axis(size, fixed=f"{label_of(node)} takes single positions") for size in indices.shape]
    flow.give(node, 0, [*axes[:along], *picked, *axes[along + 1 :]])


def _expand(flow: Flow, node: gs.Node) -> None:
    axes, sizes = flow.input(node, 0), flow.shape(node.outputs[0])
    axes = [Axis(1)] * (len(sizes) - len(axes)) + axes
    entries = stated(node.inputs[1])
    entries = [None] * (len(sizes) - len(entries or ())) + list(entries or ())
    result = [
        axis if axis.size == size else _stated_axis(flow, entry, size, node)
        for axis, size, entry in zip(axes, sizes, entries, strict=True)
    ]
    same = [entry if axis.size == size else 1 for axis, size, entry in zip(axes, sizes, entries, strict=True)]
    for axis, entry in zip(result, same, strict=True):
        if axis.columns and entry is None:
            flow.hold(axis, node, "computes this size when it runs: put fold first")
        elif isinstance(entry, SizeOf) and axis.columns:
            flow.align(axis, flow.axes[id(entry.tensor)][entry.axis])
    flow.give(node, 0, result)


def _constant_of_shape(flow: Flow, node: gs.Node) -> None:
    sizes = flow.shape(node.outputs[0])
    entries = stated(node.inputs[0]) or [None] * len(sizes)
    flow.give(node, 0, [_stated_axis(flow, entry, size, node) for entry, size in zip(entries, sizes, strict=True)])


def _stated_axis(flow: Flow, entry: int | SizeOf | None, size: int, node: gs.Node) -> Axis:
    """An axis that a node makes at a size that it is given: it can be made smaller where the size is a number."""
    if isinstance(entry, SizeOf) and id(entry.tensor) in flow.axes:
        source = flow.axes[id(entry.tensor)][entry.axis]
        if source.size == size:
            return source
    if isinstance(entry, int) and entry == size:
        return flow.units.fresh(size)
    return Axis(size, fixed=f"{node.op} {label_of(node)} makes this axis")


def _tile(flow: Flow, node: gs.Node) -> None:
    axes, repeats = flow.input(node, 0), integers_of(node, 1)
    if repeats is None:
        raise Unclear("it computes its repeats when it runs")
    result = [
        axis
        if times == 1
        else flow.units.take(axis, np.tile(positions(axis.size), times))
        if axis.size > 1
        else Axis(times, fixed=f"Tile {label_of(node)} repeats one position")
        for axis, times in zip(axes, repeats, strict=True)
    ]
    flow.give(node, 0, result)


def pads_of(node: gs.Node, rank: int) -> list[tuple[int, int]] | None:
    """Begin and end of each axis of a Pad; None where they are computed when the model runs."""
    pads = integers_of(node, 1) if has_input(node, 1) else list(node.attrs.get("pads", ()))
    axes = integers_of(node, 3) if has_input(node, 3) else list(range(rank))
    if not pads or axes is None:
        return None
    result = [(0, 0)] * rank
    for place, axis in enumerate(axes):
        result[axis % rank] = pads[place], pads[place + len(axes)]
    return result


def _pad(flow: Flow, node: gs.Node) -> None:
    axes, sizes = flow.input(node, 0), flow.shape(node.outputs[0])
    pads = pads_of(node, len(axes))
    result = []
    for place, axis in enumerate(axes):
        if pads is not None and pads[place] == (0, 0):
            result.append(axis)
        elif pads is None or min(pads[place]) < 0 or node.attrs.get("mode", "constant") != "constant":
            flow.hold(axis, node, "pads this axis")
            result.append(Axis(sizes[place], fixed=f"Pad {label_of(node)} pads this axis"))
        elif not axis.columns:
            result.append(Axis(sizes[place], fixed=axis.fixed or "its positions are not followed"))
        else:
            begin, end = (flow.units.fresh_positions(count) for count in pads[place])
            result.append(flow.units.concatenate([begin, axis, end]))
    flow.give(node, 0, result)


def _depth_to_space(flow: Flow, node: gs.Node) -> None:
    axes, sizes = flow.input(node, 0), flow.shape(node.outputs[0])
    block, is_dcr = node.attrs["blocksize"], node.attrs.get("mode", "DCR") == "DCR"
    channels = [block, block, sizes[1]] if is_dcr else [sizes[1], block, block]
    parts = flow.units.split(axes[1], channels, f"DepthToSpace {label_of(node)} mixes them with others")
    kept = parts.pop(-1 if is_dcr else 0)
    for part in parts:
        flow.hold(part, node, "makes pixels of them")
    flow.give(node, 0, [axes[0], kept, *_spatial(flow, node, axes, sizes)])


def _space_to_depth(flow: Flow, node: gs.Node) -> None:
    axes, sizes = flow.input(node, 0), flow.shape(node.outputs[0])
    block = Axis(node.attrs["blocksize"])
    channels = flow.units.join([block, block, axes[1]])
    flow.give(node, 0, [axes[0], channels, *_spatial(flow, node, axes, sizes)])


def _spatial(flow: Flow, node: gs.Node, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    return [
        Axis(size, fixed=flow.hold(axis, node, "works along this axis").fixed)
        for axis, size in zip(axes[2:], sizes[2:], strict=True)
    ]


def _shape(flow: Flow, node: gs.Node) -> None:
    flow.give(node, 0, [Axis(size) for size in flow.shape(node.outputs[0])])


MOVES: dict[str, Rule] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
