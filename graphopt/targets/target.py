"""What a target is: a table that says which operators run in int8 there, in which types, and what Q/DQ form they need.

Placement (`graphopt.placement`) reads this table and knows no operator by name; a new target is one more file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from graphopt.lint_rule import LintRule, Subject
from graphopt.quantization import QuantType


class Role(Enum):
    """What an operator does to quantizers."""

    GAINS = "gains"  # worth quantizing for its own sake: quantizers start here
    JOINS = "joins"  # has an int8 kernel: runs in int8 where its neighbours do
    COMMUTES = "commutes"  # only moves or selects values: same scale and zero point in and out
    RESCALES = "rescales"  # a positive factor: the DQ of its input, with another scale, stands in its place


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one operator is quantized.

    Attributes:
        role: see `Role`.
        inputs: the inputs that are quantized; None: all of them (Concat).
        per_channel: a constant input 1 has a scale for each output channel; else one scale.
        needs_constant_weight: input 1 must be constant.
        attributes: what attributes must be, where they are given: int8 kernels know nothing else.
        needs_output: the int8 kernel exists only with a Q on the output; else the output stays float unless
            an int8 consumer reads it.
        fuses_bias: a constant bias added behind becomes part of the operator, which then needs a Q behind the Add.
        minimum_channels: smallest number of input and of output channels that gains.
        pads_inputs: fewer input channels gain too, where the kernel is square and there is one group, as in a first
            layer: the runtime pads them, if output channels are a multiple of the target's `channel_multiple`.
        minimum_grouped_kernel: fewer channels gain too in groups with kernels of at least this size and such output
            channels; 0: they do not.
        needs_rows: a product of one row, a vector, does not gain.
        largest_kernel: largest product of a Conv's kernel sizes that gains; None: any.
        counts_groups_alone: input channels are those of one group, and with fewer there is no kernel.
        on_integers: the operator is written between Q and DQ, on the integers themselves: the runtime has a kernel
            for them but does not fuse the operator with pairs around it.
        filled_from: of such an operator, the input with a value for new elements; it must be 0, for which the zero
            point stands.
        largest_operand: input 1 must be a constant without larger values.
        since: the first version of the runtime that has the kernel, if a user may have an older one.
        joins_last: an operator that joins does so where only float operators read its result too: its float kernel
            takes longer by more than that is worth.
    """

    role: Role
    inputs: tuple[int, ...] | None = (0,)
    per_channel: bool = False
    needs_constant_weight: bool = False
    attributes: Mapping[str, int | str] = field(default_factory=dict)
    needs_output: bool = True
    fuses_bias: bool = False
    minimum_channels: int = 1
    pads_inputs: bool = False
    minimum_grouped_kernel: int = 0
    needs_rows: bool = False
    largest_kernel: int | None = None
    counts_groups_alone: bool = False
    on_integers: bool = False
    filled_from: int | None = None
    largest_operand: float | None = None
    since: str = ""
    joins_last: bool = False

    def why_not(self, op: str, attributes: Mapping[str, object]) -> str | None:
        """Why no int8 kernel takes an operator with these attributes; None where one does."""
        if all(attributes.get(name, value) == value for name, value in self.attributes.items()):
            return None
        needed = " and ".join(f"{name} = {value}" for name, value in self.attributes.items())
        return f"int8 kernels of {op} need {needed}"


class Kind(StrEnum):
    """Kinds of operators in `Costs`, beside operator types."""

    DEPTHWISE = "depthwise Conv"
    FEW_ROWS = "product of few rows"
    INNER_SOFTMAX = "Softmax of an inner axis"
    OF_ACTIVATIONS = "MatMul of two activations"
    OF_CHANNELS = "Mul by a value a channel"
    CHANNELS_FIRST_POOL = "MaxPool of channels that come first"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What int8 saves and costs on a device, in nanoseconds, to tell which operators are too small for it.

    Attributes:
        saved_ns_per_mac: by operator type, for sums over many channels. Kinds of their own (`Kind`) are depthwise
            Convs, products of at most 16 rows by a constant, where little is done with each weight that is read, and
            products of two activations. Negative where int8 is slower.
        saved_ns_and_per_value: by operator type, what the int8 kernel saves besides: once, and for each value of the
            output. Kinds of their own are a Softmax that is not of the last axis, a MaxPool where int8 Convs leave
            the channels first, and a Mul of pictures by a value a channel.
        fused_in_float: operators that are part of a float Conv before them and cost nothing there; what each costs in
            float elsewhere, once and for each value of the output.
        copied_ns: of Convs of fewer than 4 channels to fewer than 16, for each place of the kernel and of the result:
            they read copies, of so few values at a time that to copy takes longer than to compute.
        pixel_ns: of such a Mul, for each pixel, where its kernel starts anew.
        border_ns: of any Q or DQ between int8 and float operators.
        border_ns_per_element: of the tensor there.
        layout_ns: what comes on top where the float operator is a Conv, whose layout of memory is another.
        layout_ns_per_element: of the tensor there.
    """

    saved_ns_per_mac: Mapping[str, float]
    border_ns: float
    border_ns_per_element: float
    layout_ns: float = 0.0
    layout_ns_per_element: float = 0.0
    saved_ns_and_per_value: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fused_in_float: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    copied_ns: float = 0.0
    pixel_ns: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DenseConvs:
    """Which Convs of one group a runtime has its fast int8 kernels for.

    Attributes:
        multiple: of which numbers of channels are, those that go in and those that come out.
        least_outputs: channels that come out.
        largest_kernel: places of a kernel up to which these kernels gain more than channels of zeros cost.
        least_work: places of the kernel times those of the result, from which on they do.
    """

    multiple: int
    least_outputs: int
    largest_kernel: int
    least_work: int

    def take(self, outputs: int, kernel: int, result: int | None) -> bool:
        """Whether channels of zeros pay for a Conv.

        Args:
            outputs: channels that come out.
            kernel: places of the kernel.
            result: places of one sample's result; None: not known, so as many as it takes.
        """
        if outputs < self.least_outputs or outputs % self.multiple or kernel > self.largest_kernel:
            return False
        return result is None or kernel * result >= self.least_work


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Weights of few bits with a scale for each block, for matrix products whose activations stay float.

    Attributes:
        quant_type: of the stored weights; asymmetric types have a zero point for each block.
        sizes: of blocks that kernels read; the first is the one to take unless asked for another.
        divide: blocks must divide the length of the sums; else the last block may be shorter.
        may_be_shared: several products may read one DequantizeLinear; else each needs one of its own.
    """

    quant_type: QuantType
    sizes: tuple[int, ...]
    divide: bool
    may_be_shared: bool


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime and device that Q/DQ graphs are made for.

    Attributes:
        rules: by operator type; what is missing stays float without a word.
        stays_float: operators that a user would expect in int8, with the reason why they are not.
        absorbed: activation functions that the Q behind them makes redundant.
        quantizes_outputs: an int8 operator needs its output quantized too, and all consumers of that read the quantized
            tensor (onnxruntime); else quantizers belong to the consumer's input (TensorRT).
        absorbs_factors: a product with a positive constant factor costs nothing: a DQ with another scale.
        decomposed: operators that run in int8 only as what they stand for, or faster so (`graphopt.decompositions`).
        clips_hide_products: a product with a float output is not fused before a Relu or Clip, and it is before a Max.
        adds_fused_into: operators behind which an Add of two branches is fused into one, and its other input quantized.
        stores_int8_weights: weights are written as integers behind a DQ, else as float behind Q and DQ.
        saturates: its kernels add two products of a uint8 and an int8 in 16 bits, so weights must keep such sums small;
            depthwise kernels do not.
        runs_here: the target is onnxruntime on this CPU: figures measured here are its own. For the others, outputs
            are checked with the arithmetic that Q and DQ stand for, and latency here says nothing.
        activations: types of activations that `qdq:activations` may ask for, by name. Where they are floats, so are the
            weights: no kernel multiplies floats by integers.
        activation_rules: by such a name, the rules that hold instead of `rules`.
        block_weights: weights in blocks that `qdq:weights` may ask for, by name.
        channel_multiple: kernels are fastest at channel counts that are multiples of it.
        dense_convs: what Convs that read a model's inputs are padded for (`graphopt.padded_channels`); None: nothing.
        repeats_pixels: between int8 Convs its Resize is slower than copies (`graphopt.repeated_pixels`).
        aborts_at_moved_reads: it cannot load what `graphopt.moved_reads` mends.
        quantizes_weights: operators whose float weights it would quantize itself (`graphopt.float_weights`).
        costs: what operators must save to run in int8; None: any that can do.
        notes: what the report should say about a model for this target.
        lint_rules: what `graphopt lint` holds a model against; see `graphopt.lint_rule`.
        lint_figures: what it counts besides, by name.
    """

    name: str
    description: str
    activation: QuantType
    weight: QuantType
    rules: Mapping[str, Rule]
    stays_float: Mapping[str, str] = field(default_factory=dict)
    absorbed: frozenset[str] = frozenset({"Relu", "Clip"})
    quantizes_outputs: bool = True
    absorbs_factors: bool = False
    decomposed: frozenset[str] = frozenset()
    clips_hide_products: bool = False
    adds_fused_into: frozenset[str] = frozenset()
    stores_int8_weights: bool = True
    saturates: bool = False
    runs_here: bool = False
    activations: Mapping[str, QuantType] = field(default_factory=dict)
    activation_rules: Mapping[str, Mapping[str, Rule]] = field(default_factory=dict)
    block_weights: Mapping[str, Blocks] = field(default_factory=dict)
    channel_multiple: int = 8
    dense_convs: DenseConvs | None = None
    repeats_pixels: bool = False
    aborts_at_moved_reads: bool = False
    quantizes_weights: frozenset[str] = frozenset()
    costs: Costs | None = None
    notes: tuple[str, ...] = ()
    lint_rules: tuple[LintRule, ...] = ()
    lint_figures: Callable[[Subject], Mapping[str, int | float]] | None = None
