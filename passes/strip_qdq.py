"""Turn a Q/DQ graph, from whatever tool, back into a float one: to fold it, calibrate it and quantize it anew.

    x -> Q(s, z) -> DQ(s, z)             activation     x
    int8 w -> DQ(s, z)                   weight, bias   the constant (w - z) * s
    float w -> Q -> DQ                   weight         w, as it is: nothing is lost
    x -> Q(s, z) -> DQ(t, z)             a free factor  x * (t / s), behind what of the clipping is meant
    x -> Q -> moves integers -> DQ       such as a Pad  the same operator on x (`graphopt.moved_integers`)
    x -> Q -> QLinearConv -> DQ          QOperator form Q/DQ pairs around a Conv first (`graphopt.qlinear`)
    x -> DynamicQuantizeLinear -> MatMulInteger         the MatMul of x (`graphopt.dynamic_quantization`)

QuantizeLinear does three things: it rounds, it scales, and it clips to [(qmin - z) * s, (qmax - z) * s]. Rounding goes.
Scaling stays where Q and DQ differ. Clipping is a side effect where the range was calibrated, and goes too; but tools
let it stand for a Relu or a Clip that they remove, and then it is part of the network:

- A zero point at the lowest stored value clips at 0 exactly. Where the tensor is never negative anyway (behind a Relu,
  a Sigmoid, a MaxPool of such), or is a graph input, or a Relu or Clip stands behind the pair too, nothing was removed
  and nothing is lost. Elsewhere the Q stands for an activation function, and the file does not tell a Relu from a
  Relu6, whose upper end a network may depend on (hard-swish without it grows without bound). So both ends stay, as one
  Clip: what the quantized graph does, without the rounding. `clips=relu` keeps the lower end alone, for networks that
  have no other activation function.
- A zero point at the highest value: the same, upside down.
- With other zero points, nothing tells a calibrated range from a Clip that was removed; both ends go. `clips=all` keeps
  those of every activation.
- With different scales and a zero point at the lowest or highest value, the pair was made on purpose, such as for
  hard-swish, and clips on purpose: both ends stay.

Types: float32, float16 and whatever else the DequantizeLinear computes. Left alone, with the reason: scales that are
computed at run time or are no positive numbers, blocks of activations, a stored tensor that others than
DequantizeLinear read (operators that compute with integers, graph outputs), and MatMulNBits, in which nothing is left
to take apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.dynamic_quantization import undo, why_not_undone
from graphopt.graph import (
    Array,
    Names,
    all_graphs,
    constant_of,
    is_constant,
    label_of,
    named_tensors,
    producer,
    remove_nodes,
    replace_uses,
    set_input,
    set_output,
)
from graphopt.moved_integers import fills_with_integer_zero, moved_inputs, set_fill, sources_of
from graphopt.never_negative import is_never_negative
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.qlinear import computes_with_integers, why_not_written_out, write_out
from graphopt.quantizers import Quantizer, change_by, dtype_of, ends_of, quantizer_of, values_of


class Clips(Enum):
    """Which ends of the range of an activation become Relu or Clip nodes."""

    AUTO = "auto"  # both, where the Q may stand for an activation function that clips at 0
    RELU = "relu"  # there, the end at 0 alone
    NONE = "none"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class StripQdq(Pass):
    """Remove QuantizeLinear and DequantizeLinear: activations lose their pairs, stored weights become float."""

    name: ClassVar[str] = "strip-qdq"
    effect: ClassVar[Effect] = Effect.LOSSY

    clips: Clips = field(
        default=Clips.AUTO,
        metadata={
            "help": "what stays of ranges: auto, a Clip where a Q may stand for a Relu6; relu, a Relu there; none; all"
        },
    )

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Strip `graph` and the graphs in it."""
        context.infer_shapes(graph)
        stripping = _Stripping(graph, self.clips)
        graphs = list(all_graphs(graph))
        for each in graphs:
            stripping.write_out(each)
            stripping.run(each)
        for each in reversed(graphs):  # branches first: they read what the graphs around them compute
            stripping.remove_unread(each)
        return PassResult(
            rewrites=sum(stripping.parts.values()),
            skipped=tuple(stripping.skipped),
            parts=stripping.parts,
        )


class _Stripping:
    def __init__(self, root: gs.Graph, clips: Clips) -> None:
        self.clips = clips
        self.names = Names(root)
        self.named = named_tensors(root)
        self.skipped: list[Skip] = []
        self.clipped: dict[tuple[int, int, float | None, float | None], gs.Node] = {}  # a Q may have several DQ
        self.moved: dict[tuple[int, int, bytes, bytes], gs.Node] = {}  # so may what moves integers
        self.replaced: dict[int, gs.Node] = {}  # by id of a node that moved integers, the one that moves floats
        self.opset = int(root.opset)
        self.parts = {
            "operators written out": 0,
            "activations": 0,
            "weights": 0,
            "integer operators": 0,
            "clips kept": 0,
            "factors kept": 0,
        }

    def write_out(self, graph: gs.Graph) -> None:
        """Put Q/DQ pairs and float operators in the place of operators that compute with integers."""
        nodes: list[gs.Node] = []
        for node in graph.nodes:
            if not computes_with_integers(node):
                nodes.append(node)
                continue
            is_dynamic = node.op == "DynamicQuantizeLinear"
            reason = why_not_undone(node, self.named) if is_dynamic else why_not_written_out(node, self.opset)
            if reason is not None:
                self.skipped.append(Skip(label_of(node), reason))
                nodes.append(node)
                continue
            if is_dynamic:
                undo(node, self.names)
            else:
                nodes += write_out(node, self.opset, self.names)
            self.parts["operators written out"] += 1
        graph.nodes[:] = nodes

    def run(self, graph: gs.Graph) -> None:
        """Take out the DequantizeLinear nodes that can be."""
        doomed: list[gs.Node] = []
        for node in list(graph.nodes):
            dequantizer = quantizer_of(node)
            if dequantizer is None or dequantizer.quantizes:
                continue
            if (reason := _why_not(dequantizer)) is not None:
                self.skipped.append(Skip(dequantizer.label, reason))
                continue
            doomed.append(node)
            self._strip(graph, dequantizer)
        remove_nodes(graph, doomed)

    def remove_unread(self, graph: gs.Graph) -> None:
        """Remove what nothing reads any more: nodes that moved integers, and QuantizeLinear nodes."""
        for node in graph.nodes:
            if node.op in _SIZES and (real := self._same_sizes(node.inputs[0])) is not None:
                set_input(node, 0, real)
        graph.toposort()
        for node in reversed(list(graph.nodes)):
            if id(node) in self.replaced and not any(each.outputs or id(each) in self.named for each in node.outputs):
                remove_nodes(graph, [node])
                self.replaced[id(node)].name = node.name
        remove_nodes(graph, [node for node in graph.nodes if self._is_idle_quantizer(node)])

    def _same_sizes(self, stored: gs.Tensor) -> gs.Tensor | None:
        """The real values that integers stand for, or that are moved like them: what has their sizes."""
        node = producer(stored)
        if (found := quantizer_of(node)) is not None and found.quantizes:
            return found.data
        if node is None or (moved := self.replaced.get(id(node))) is None:
            return None
        return moved.outputs[next(index for index, output in enumerate(node.outputs) if output is stored)]

    def _is_idle_quantizer(self, node: gs.Node) -> bool:
        found = quantizer_of(node)
        if found is None or not found.quantizes:
            return False
        if not found.output.outputs and id(found.output) not in self.named:
            return True
        if found.output.outputs and not any(quantizer_of(reader) for reader in found.output.outputs):
            self.skipped.append(Skip(found.label, f"{label_of(found.output.outputs[0])} computes with what it stores"))
        return False

    def _strip(self, graph: gs.Graph, dequantizer: Quantizer) -> None:
        values = self._values(graph, dequantizer.data, dequantizer)
        self.parts["weights" if is_constant(values) else "activations"] += 1
        self._take_place(graph, dequantizer.output, values)

    def _values(self, graph: gs.Graph, stored: gs.Tensor, dequantizer: Quantizer) -> gs.Tensor:
        """The real values that `stored` holds when it is read with the scale of a DequantizeLinear."""
        if (integers := constant_of(stored)) is not None:
            return gs.Constant(self.names.fresh(f"{dequantizer.output.name}/float"), values_of(dequantizer, integers))
        node = producer(stored)
        quantizer = quantizer_of(node)
        if quantizer is None:
            assert node is not None
            return self._moved(graph, node, stored, dequantizer)
        if (constant := constant_of(quantizer.data)) is None:
            return self._activation(graph, quantizer, dequantizer)
        factor, shift = change_by(quantizer, dequantizer)
        if np.all(factor == 1) and np.all(shift == 0):
            return quantizer.data
        return gs.Constant(self.names.fresh(f"{quantizer.data.name}/scaled"), constant * factor + shift)

    def _moved(self, graph: gs.Graph, node: gs.Node, stored: gs.Tensor, dequantizer: Quantizer) -> gs.Tensor:
        """What an operator that moves integers computes from their real values: the operator, written anew."""
        assert dequantizer.scale is not None and dequantizer.zero_point is not None
        key = id(graph), id(node), dequantizer.scale.tobytes(), dequantizer.zero_point.astype(np.int64).tobytes()
        if key not in self.moved:
            inputs = list(node.inputs)
            for index in moved_inputs(node) or ():
                inputs[index] = self._values(graph, inputs[index], dequantizer)
            if fills_with_integer_zero(node) and dequantizer.zero_point.any():
                zero = values_of(dequantizer, np.zeros((), np.int64))
                set_fill(inputs, gs.Constant(self.names.fresh(f"{stored.name}/fill"), zero))
            outputs = [
                gs.Variable(self.names.fresh(f"{each.name}/float"), dequantizer.output.dtype, each.shape)
                for each in node.outputs
            ]
            self.moved[key] = gs.Node(node.op, self.names.fresh(label_of(node)), dict(node.attrs), inputs, outputs)
            graph.nodes.append(self.moved[key])
            self.replaced.setdefault(id(node), self.moved[key])
            self.parts["integer operators"] += 1
        index = next(index for index, output in enumerate(node.outputs) if output is stored)
        return self.moved[key].outputs[index]

    def _activation(self, graph: gs.Graph, quantizer: Quantizer, dequantizer: Quantizer) -> gs.Tensor:
        """The real values that a pair hands on: x, clipped and scaled as far as that is meant."""
        factor, shift = change_by(quantizer, dequantizer)
        low, high = ends_of(quantizer)
        changes = bool(np.any(factor != 1) or np.any(shift != 0))
        if self.clips is not Clips.ALL and not (changes and 0 in (low, high)):
            low, high = self._meant_ends(quantizer, dequantizer, low, high)
        if quantizer.is_per_tensor and (low is not None or high is not None):
            values = self._clip(graph, quantizer, low, high)
        else:
            values = quantizer.data
        if changes:
            self.parts["factors kept"] += 1
            if np.any(factor != 1):
                values = self._with_constant(graph, "Mul", values, factor, quantizer)
            if np.any(shift != 0):
                values = self._with_constant(graph, "Add", values, shift, quantizer)
        return values

    def _meant_ends(
        self, quantizer: Quantizer, dequantizer: Quantizer, low: float | None, high: float | None
    ) -> tuple[float | None, float | None]:
        """Of the ends of a range, those that stand for an activation function."""
        if self.clips is Clips.NONE or 0 not in (low, high):
            return None, None
        if _needs_no_activation(quantizer.data, low) or _is_before_activations(dequantizer):
            return None, None
        if self.clips is Clips.AUTO:
            return low, high
        return (0.0, None) if low == 0 else (None, 0.0)

    def _clip(self, graph: gs.Graph, quantizer: Quantizer, low: float | None, high: float | None) -> gs.Tensor:
        key = id(graph), id(quantizer.node), low, high
        if key not in self.clipped:
            node = producer(self._clip_node(graph, quantizer, low, high))
            assert node is not None
            self.clipped[key] = node
            self.parts["clips kept"] += 1
        return self.clipped[key].outputs[0]

    def _clip_node(self, graph: gs.Graph, quantizer: Quantizer, low: float | None, high: float | None) -> gs.Tensor:
        if low == 0 and high is None:
            return self._add(graph, "Relu", [quantizer.data], quantizer)
        dtype = dtype_of(quantizer.data) or np.dtype(np.float32)
        if graph.opset < _LIMITS_AS_INPUTS:
            limits = {"min": low, "max": high}
            attributes = {name: float(value) for name, value in limits.items() if value is not None}
            return self._add(graph, "Clip", [quantizer.data], quantizer, attributes)
        inputs = [
            gs.Variable.empty()
            if value is None
            else gs.Constant(self.names.fresh(f"{quantizer.data.name}/{end}"), np.asarray(value, dtype))
            for end, value in (("min", low), ("max", high))
        ]
        return self._add(graph, "Clip", [quantizer.data, *inputs], quantizer)

    def _with_constant(
        self, graph: gs.Graph, op: str, tensor: gs.Tensor, value: Array, quantizer: Quantizer
    ) -> gs.Tensor:
        operand = gs.Constant(self.names.fresh(f"{quantizer.data.name}/{op}_by"), value)
        return self._add(graph, op, [tensor, operand], quantizer)

    def _add(
        self,
        graph: gs.Graph,
        op: str,
        inputs: list[gs.Tensor],
        quantizer: Quantizer,
        attributes: dict[str, Any] | None = None,
    ) -> gs.Tensor:
        name = self.names.fresh(f"{quantizer.data.name}/{op}")
        output = gs.Variable(self.names.fresh(f"{name}_output"), quantizer.data.dtype, quantizer.data.shape)
        graph.nodes.append(gs.Node(op, name, attributes or {}, inputs, [output]))
        return output

    def _take_place(self, graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let everything read `new` for `old`; a tensor whose name must stay is computed by another node."""
        if id(old) not in self.named:
            replace_uses(old, new)
            return
        node, dequantizing = producer(new), producer(old)
        assert dequantizing is not None
        set_output(dequantizing, 0, gs.Variable(self.names.fresh(f"{old.name}/stripped"), old.dtype, old.shape))
        renames = id(new) not in self.named and not is_constant(new) and any(each is node for each in graph.nodes)
        if node is not None and renames:
            replace_uses(new, old)
            index = next(index for index, output in enumerate(node.outputs) if output is new)
            set_output(node, index, old)
            return
        graph.nodes.append(gs.Node("Identity", self.names.fresh(f"{old.name}/Identity"), {}, [new], [old]))


_SIZES = frozenset({"Shape", "Size"})
_LIMITS_AS_INPUTS = 11  # the opset since which those of Clip are


def _is_before_activations(dequantizer: Quantizer) -> bool:
    """Whether only activation functions that clip read a DequantizeLinear."""
    (output,) = dequantizer.node.outputs
    return bool(output.outputs) and all(node.op in ("Relu", "Clip") for node in output.outputs)


def _why_not(dequantizer: Quantizer) -> str | None:
    """Why a DequantizeLinear must stay, with the Q before it and what moves integers between them."""
    sources = sources_of(dequantizer.data)
    quantizers = [found for each in sources if (found := quantizer_of(producer(each))) is not None]
    for each in (*quantizers, dequantizer):
        if each.scale is None or each.zero_point is None:
            return f"scale or zero point of {each.label} is computed at run time"
        if not np.all(np.isfinite(each.scale) & (each.scale > 0)):
            return f"the scale of {each.label} is no positive number, so what it stands for is not known"
        if each.block_size and not all(is_constant(source) for source in sources):
            return f"{each.label} has a scale for each block of an activation: only those of weights are stripped"
    by_channel = next((each for each in (dequantizer, *quantizers) if not each.is_per_tensor), None)
    if by_channel is not None and not any(each is dequantizer.data for each in sources):
        return f"{by_channel.label} has a scale for each channel, and what it stores is moved between Q and DQ"
    for quantizer in quantizers:
        if quantizer.axis != dequantizer.axis and not (quantizer.is_per_tensor and dequantizer.is_per_tensor):
            return f"{quantizer.label} before it has scales along another axis"
        given, returned = dtype_of(quantizer.data), dtype_of(dequantizer.output)
        if given is not None and returned is not None and given != returned:
            return f"it returns {returned}, and {quantizer.label} takes {given}"
    for each in sources:
        if not is_constant(each) and quantizer_of(producer(each)) is None:
            return f"{each.name}, which it reads, is computed in integers"
    return None


def _needs_no_activation(tensor: gs.Tensor, low: float | None) -> bool:
    """Whether a tensor is a graph input, or never negative where that is all that a range from `low` sees to."""
    return producer(tensor) is None or (low == 0 and is_never_negative(tensor))
