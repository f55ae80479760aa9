"""Fold Pad with zeros on spatial axes into the pads of what reads it.

A Conv reads zeros beyond the border of its input, so zeros that a Pad writes there first are the same:

    Conv(Pad(x, [0, 0, b..., 0, 0, e...]), pads = p) = Conv(x, pads = p + [b..., e...])

with x of shape [N, C, D1, ..., Dk] and pads in the order of the operator page: k begins, then k ends. AveragePool does
so too where it counts the padding (count_include_pad = 1). MaxPool does not: its border is minus infinity.

The Pad stays while another node reads it. Refused: another mode or value, pads on the batch or channel axis, negative
ones (they crop), pads that are not constant, and auto_pad = SAME_*, which depends on the size of the padded input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import all_graphs, constant_of, is_constant, set_input
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip


@dataclass(frozen=True, kw_only=True)
class FoldPad(Pass):
    """Fold Pad with zeros on spatial axes into the Conv or AveragePool that reads it."""

    name: ClassVar[str] = "fold-pad"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Let readers pad by themselves; the Pad is then dead where they all do."""
        folded = 0
        skipped: list[Skip] = []
        for each in all_graphs(graph):
            for pad in [node for node in each.nodes if node.op == "Pad" and not node.domain]:
                readers = [node for node in pad.outputs[0].outputs if node.op in ("Conv", "AveragePool")]
                for reader in readers:
                    reason = _why_not_pad(pad) or _why_not_reader(pad, reader)
                    if reason is None:
                        _fold(pad, reader)
                        folded += 1
                    else:
                        skipped.append(Skip(pad.name or pad.outputs[0].name, f"not folded into {reader.op}: {reason}"))
        return PassResult(rewrites=folded, skipped=tuple(skipped))


def _why_not_pad(pad: gs.Node) -> str | None:
    if pad.attrs.get("mode", "constant") != "constant":
        return f"its mode is {pad.attrs['mode']}, and a convolution's border is zero"
    if any(not is_constant(tensor) for tensor in pad.inputs[1:] if tensor.name):
        return "its pads, value or axes are computed at run time"
    if _value(pad) != 0:
        return f"it writes {_value(pad):g}, and a convolution's border is zero"
    pads = _pads(pad)
    if pads is None:
        return "it names axes, and the rank of its input is not known"
    if min(pads, default=0) < 0:
        return "a negative pad crops"
    half = len(pads) // 2
    if any(pads[:2]) or any(pads[half : half + 2]):
        return "it pads the batch or the channel axis"
    return None


def _why_not_reader(pad: gs.Node, reader: gs.Node) -> str | None:
    if reader.inputs[0] is not pad.outputs[0]:
        return "it pads the weight"
    if reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"auto_pad {reader.attrs['auto_pad']} depends on the size of the padded input"
    if reader.op == "AveragePool" and not reader.attrs.get("count_include_pad", 0):
        return "an AveragePool without count_include_pad leaves its own padding out of the mean"
    if reader.op == "AveragePool" and reader.attrs.get("ceil_mode", 0):
        return "with ceil_mode the last window counts only what is inside the padding"
    return None


def _fold(pad: gs.Node, reader: gs.Node) -> None:
    pads = _pads(pad)
    assert pads is not None  # _why_not_pad
    half = len(pads) // 2
    spatial = pads[2:half] + pads[half + 2 :]
    own = reader.attrs.get("pads") or [0] * len(spatial)
    reader.attrs.pop("auto_pad", None)
    reader.attrs["pads"] = [mine + added for mine, added in zip(own, spatial, strict=True)]
    set_input(reader, 0, pad.inputs[0])


def _value(pad: gs.Node) -> float:
    """The value that a Pad writes: an attribute before opset 11, an input since."""
    if len(pad.inputs) > 2 and pad.inputs[2].name:
        value = constant_of(pad.inputs[2])
        return 0.0 if value is None else float(value.reshape(()))
    return float(pad.attrs.get("value", 0.0))


def _pads(pad: gs.Node) -> list[int] | None:
    """Begins of all axes, then ends; None where they cannot be told."""
    stated = constant_of(pad.inputs[1]) if len(pad.inputs) > 1 else np.asarray(pad.attrs.get("pads", []))
    if stated is None:
        return None
    pads = [int(each) for each in stated]
    if len(pad.inputs) < 4 or not pad.inputs[3].name:
        return pads
    axes, shape = constant_of(pad.inputs[3]), pad.inputs[0].shape
    if axes is None or shape is None:
        return None
    whole = [0] * (2 * len(shape))
    for place, axis in enumerate(int(axis) % len(shape) for axis in axes):
        whole[axis], whole[len(shape) + axis] = pads[place], pads[place + len(axes)]
    return whole
