"""Fold Pad with a constant into what reads it: into the pads on spatial axes, into the weight on the channel axis.

A Conv reads zeros beyond the border of its input, so zeros that a Pad writes there first are the same:

    Conv(Pad(x, [0, 0, b..., 0, 0, e...]), pads = p) = Conv(x, pads = p + [b..., e...])

with x of shape [N, C, D1, ..., Dk] and pads in the order of the operator page: k begins, then k ends. Channels of zeros
add nothing to a Conv of one group: the weights that read them go. AveragePool reads zeros beyond its border
too where it counts the padding (count_include_pad = 1). The border of MaxPool never wins, so there the Pad may write
any value v that never wins either: the lowest of the type, or one that x never falls below, such as 0 after a Relu.
Every window must then hold an element of x, which is so where the pads are smaller than the window, without gaps
(dilations) and without a window past the end (ceil_mode). Two Pads in a row that write one value are one, on all axes.

The Pad stays while another node reads it. Refused: another mode or value, pads on the batch axis or on channels that
are pooled or grouped, negative ones (they crop), pads that are not constant, and auto_pad = SAME_*, which depends on
the size of the padded input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import (
    Names,
    all_graphs,
    constant_of,
    has_input,
    is_constant,
    label_of,
    named_tensors,
    present,
    producer,
    set_input,
)
from graphopt.operators import NEVER_NEGATIVE
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip


@dataclass(frozen=True, kw_only=True)
class FoldPad(Pass):
    """Fold Pad with a constant into the Conv, pooling or Pad that reads it."""

    name: ClassVar[str] = "fold-pad"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Let readers pad by themselves; the Pad is then dead where they all do."""
        pads = [node for each in all_graphs(graph) for node in each.nodes if node.op == "Pad" and not node.domain]
        if not pads:
            return PassResult()
        if any(len(pad.inputs) > 3 and pad.inputs[0].shape is None for pad in pads):
            context.infer_shapes(graph)  # named axes count from the end
        named, names = named_tensors(graph), Names(graph)
        folded = 0
        skipped: list[Skip] = []
        for pad in pads:
            for reader in [node for node in pad.outputs[0].outputs if node.op in _WHY_NOT and not node.domain]:
                if reader.op == "Pad" and (len(pad.outputs[0].outputs) > 1 or id(pad.outputs[0]) in named):
                    continue  # both would stay, and nothing be won
                reason = _why_not_pad(pad) or _WHY_NOT[reader.op](pad, reader)
                if reason is not None:
                    skipped.append(Skip(label_of(pad), f"not folded into {reader.op}: {reason}"))
                    continue
                if reader.op == "Pad":
                    _join(pad, reader, names)
                else:
                    _fold(pad, reader, names)
                folded += 1
        return PassResult(rewrites=folded, skipped=tuple(skipped))


def _why_not_pad(pad: gs.Node) -> str | None:
    if pad.attrs.get("mode", "constant") != "constant":
        return f"its mode is {pad.attrs['mode']}, and a border is constant"
    if any(not is_constant(tensor) for tensor in pad.inputs[1:] if tensor.name):
        return "its pads, value or axes are computed at run time"
    pads = _pads(pad)
    if pads is None:
        return "it names axes, and the rank of its input is not known"
    return "a negative pad crops" if min(pads, default=0) < 0 else None


def _why_not_spatial(pad: gs.Node, reader: gs.Node) -> str | None:
    batch, channels, *spatial = map(any, _sides(pad))
    if batch or (channels and reader.op != "Conv"):
        return "it pads the batch or the channel axis"
    if reader.inputs[0] is not pad.outputs[0]:
        return "it pads the weight"
    if any(spatial) and reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"auto_pad {reader.attrs['auto_pad']} depends on the size of the padded input"
    return None


def _why_not_conv(pad: gs.Node, reader: gs.Node) -> str | None:
    if _value(pad) != 0:
        return f"it writes {_value(pad):g}, and a convolution's border is zero"
    if any(_sides(pad)[1]):
        if reader.attrs.get("group", 1) > 1:
            return "it pads channels of a convolution of several groups"
        if not is_constant(reader.inputs[1]) or len(reader.inputs[1].outputs) > 1:
            return "the weights for the channels that it pads are computed at run time, or others read them too"
    return _why_not_spatial(pad, reader)


def _why_not_average(pad: gs.Node, reader: gs.Node) -> str | None:
    if _value(pad) != 0:
        return f"it writes {_value(pad):g}, and the border of AveragePool is zero"
    if not reader.attrs.get("count_include_pad", 0):
        return "an AveragePool without count_include_pad leaves its own padding out of the mean"
    if reader.attrs.get("ceil_mode", 0):
        return "with ceil_mode the last window counts only what is inside the padding"
    return _why_not_pool(pad, reader)


def _why_not_max(pad: gs.Node, reader: gs.Node) -> str | None:
    if len(present(reader.outputs)) > 1:
        return "its second output counts positions in the padded input"
    if reader.attrs.get("ceil_mode", 0) or any(step != 1 for step in reader.attrs.get("dilations") or ()):
        return "with ceil_mode or dilations a window may lie in the padding alone"
    value = _value(pad)
    if value > _lowest(pad.inputs[0].dtype) and not _never_below(pad.inputs[0], value):
        return f"it writes {value:g}, which its input may fall below: then the padding wins"
    return _why_not_pool(pad, reader)


def _why_not_pool(pad: gs.Node, reader: gs.Node) -> str | None:
    reason = _why_not_spatial(pad, reader)
    if reason is not None:
        return reason
    sizes = reader.attrs["kernel_shape"]
    if any(pads >= size for pads, size in zip(_spatial_pads(pad, reader), (*sizes, *sizes), strict=True)):
        return "a window would lie in the padding alone, which onnxruntime refuses too"
    return None


def _why_not_join(pad: gs.Node, reader: gs.Node) -> str | None:
    if reader.inputs[0] is not pad.outputs[0]:
        return "it computes the pads of the other"
    reason = _why_not_pad(reader)
    if reason is not None:
        return f"of the other, {reason}"
    return None if _value(pad) == _value(reader) else f"they write {_value(pad):g} and {_value(reader):g}"


_WHY_NOT: dict[str, Callable[[gs.Node, gs.Node], str | None]] = {
    "AveragePool": _why_not_average,
    "Conv": _why_not_conv,
    "MaxPool": _why_not_max,
    "Pad": _why_not_join,
}


def _lowest(dtype: Any) -> float:
    """The lowest finite value of a type, which is what runtimes start a maximum with; -inf where it is not known."""
    if dtype is None or isinstance(dtype, int):
        return -np.inf
    dtype = np.dtype(dtype)
    return float(np.finfo(dtype).min if dtype.kind == "f" else np.iinfo(dtype).min)


_KEEP_VALUES = {"Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


def _never_below(tensor: gs.Tensor, value: float) -> bool:
    """Whether every element is at least `value`, as far as the operators before tell."""
    pending, seen = [tensor], set()
    while pending:
        tensor = pending.pop()
        node = producer(tensor)
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if node is None or node.domain or tensor is not node.outputs[0]:
            return False
        if node.op == "Concat":
            pending += node.inputs
        elif node.op in _KEEP_VALUES:
            pending.append(node.inputs[0])
        elif not (value <= 0 and node.op in NEVER_NEGATIVE) and not (node.op == "Clip" and value <= _clipped_at(node)):
            return False
    return True


def _clipped_at(clip: gs.Node) -> float:
    """The lower limit of a Clip: an attribute before opset 11, an input since; -inf where it is not known."""
    if has_input(clip, 1):
        limit = constant_of(clip.inputs[1])
        return -np.inf if limit is None else float(limit.reshape(()))
    return float(clip.attrs.get("min", -np.inf))


def _fold(pad: gs.Node, reader: gs.Node, names: Names) -> None:
    if reader.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"):  # else the sizes stay as they are
        reader.attrs["pads"] = _spatial_pads(pad, reader)
        reader.attrs.pop("auto_pad", None)
    before, after = _sides(pad)[1]
    if before or after:
        weight = constant_of(reader.inputs[1])
        assert weight is not None  # _why_not_conv
        read = np.ascontiguousarray(weight[:, before : weight.shape[1] - after])
        set_input(reader, 1, gs.Constant(names.fresh(f"{reader.inputs[1].name}/read"), read))
    set_input(reader, 0, pad.inputs[0])


def _spatial_pads(pad: gs.Node, reader: gs.Node) -> list[int]:
    """The pads of a Pad on the spatial axes and those of its reader, added."""
    begins, ends = zip(*_sides(pad)[2:], strict=True)
    spatial = [*begins, *ends]
    own = reader.attrs.get("pads") or [0] * len(spatial)
    return [mine + added for mine, added in zip(own, spatial, strict=True)]


def _sides(pad: gs.Node) -> list[tuple[int, int]]:
    """By axis, how much a Pad puts before and how much behind."""
    pads = _pads(pad)
    assert pads is not None  # _why_not_pad
    half = len(pads) // 2
    return list(zip(pads[:half], pads[half:], strict=True))


def _join(pad: gs.Node, reader: gs.Node, names: Names) -> None:
    first, second = _pads(pad), _pads(reader)
    assert first is not None and second is not None  # _why_not_pad
    pads = [one + other for one, other in zip(first, second, strict=True)]
    set_input(reader, 0, pad.inputs[0])
    if "pads" in reader.attrs:  # opset < 11
        reader.attrs["pads"] = pads
        return
    set_input(reader, 1, gs.Constant(names.fresh(f"{reader.outputs[0].name}/pads"), np.array(pads, np.int64)))
    if len(reader.inputs) > 3:
        set_input(reader, 3, gs.Variable.empty())
        list.pop(reader.inputs)  # all axes; graphsurgeon would look the tensor up by name


def _value(pad: gs.Node) -> float:
    """The value that a Pad writes: an attribute before opset 11, an input since."""
    if has_input(pad, 2):
        value = constant_of(pad.inputs[2])
        return 0.0 if value is None else float(value.reshape(()))
    return float(pad.attrs.get("value", 0.0))


def _pads(pad: gs.Node) -> list[int] | None:
    """Begins of all axes, then ends; None where they cannot be told."""
    stated = constant_of(pad.inputs[1]) if len(pad.inputs) > 1 else np.asarray(pad.attrs.get("pads", []))
    if stated is None:
        return None
    pads = [int(each) for each in stated]
    if not has_input(pad, 3):
        return pads
    axes, shape = constant_of(pad.inputs[3]), pad.inputs[0].shape
    if axes is None or shape is None:
        return None
    whole = [0] * (2 * len(shape))
    for place, axis in enumerate(int(axis) % len(shape) for axis in axes):
        whole[axis], whole[len(shape) + axis] = pads[place], pads[place + len(axes)]
    return whole
