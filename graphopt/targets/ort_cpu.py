"""onnxruntime's CPU provider on x86: which Q/DQ groups it fuses into int8 kernels.

Read in the source of onnxruntime 1.31 (core/optimizer/qdq_transformer) and confirmed by loading groups and listing
the optimized operators (tests/test_targets.py). A group is fused when every input comes from a DequantizeLinear, every
output goes to one QuantizeLinear and is no graph output, and scales are constant.

Activations are uint8 and weights int8: the only combination with fast kernels on VNNI. On x86 without VNNI those
kernels add two products of a uint8 and an int8 in 16 bits and saturate, which ruins results in silence; there, scales
of weights are chosen so that none can (`graphopt.saturation`). That costs a fraction of a bit, at most one, and weights
of a VNNI machine must not be used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graphopt.quantization import INT8, INT8_WEIGHT, INT16, UINT4_WEIGHT, UINT8, UINT16
from graphopt.targets.ort_rules import ORT_ARM_RULES, ORT_X86_RULES, figures, sums_do_not_saturate
from graphopt.targets.target import Blocks, Costs, DenseConvs, Kind, Role, Rule, Target

_JOINS = Rule(role=Role.JOINS)
_JOINS_WITH_ALL_INPUTS = Rule(role=Role.JOINS, inputs=None)
_COMMUTES = Rule(role=Role.COMMUTES)
_HARD_ACTIVATIONS = ("HardSigmoid", "HardSwish")

_RULES = {
    "Conv": Rule(role=Role.GAINS, inputs=(0, 1), per_channel=True, needs_constant_weight=True),
    "Gemm": Rule(
        role=Role.GAINS,
        inputs=(0, 1),
        per_channel=True,
        needs_constant_weight=True,
        attributes={"transA": 0, "beta": 1},
    ),
    # Without a Q behind it onnxruntime makes MatMulIntegerToFloat of it: no output rounding. But with a bias it first
    # makes a Gemm of both, and a Gemm without a Q behind it runs in float, its weight dequantized again in every run.
    "MatMul": Rule(role=Role.GAINS, inputs=(0, 1), per_channel=True, needs_output=False, fuses_bias=True),
    "Add": _JOINS_WITH_ALL_INPUTS,
    "Mul": _JOINS_WITH_ALL_INPUTS,
    "Concat": _JOINS_WITH_ALL_INPUTS,
    "Where": Rule(role=Role.JOINS, inputs=(1, 2)),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "Sigmoid", "Softmax"), _JOINS),
    "LeakyRelu": Rule(role=Role.JOINS, joins_last=True),  # behind a Conv of waifu2x 486 us in float and 85 in int8
    **dict.fromkeys(_HARD_ACTIVATIONS, _JOINS),
    "PRelu": Rule(
        role=Role.JOINS,
        inputs=None,
        on_integers=True,
        largest_operand=1.0,
        since="onnxruntime 1.24",  # Max of uint8 and int8
        joins_last=True,
    ),
    "Pad": Rule(role=Role.COMMUTES, on_integers=True, filled_from=2),
    "Resize": Rule(role=Role.COMMUTES, attributes={"mode": "nearest"}),
    **dict.fromkeys(("MaxPool", "Expand", "Flatten", "Gather", "Reshape", "Slice"), _COMMUTES),
    **dict.fromkeys(("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "DepthToSpace"), _COMMUTES),
}

# Between integers of 16 bits onnxruntime computes in float, where PRelu is one operator and not three.
_RULES_OF_16_BITS = {op: rule for op, rule in _RULES.items() if op != "PRelu"}

# Two threads, AVX-512 with VNNI. In a chain of Convs (benchmarks/measure_costs.py) dense ones of 16 channels and more
# save 0.003 (AMD Zen 5) to 0.006 ns a MAC (Zen 4), those of 8 up to 0.13. Depthwise Convs lose up to 0.02 ns a MAC
# where the tensor is large, and gain as much where it is small. Between float operators one row times 0.2 and 0.26 M
# weights loses 1 and 2 us, 0.6 M save 2 us and 1 M, which are not in the cache, 26; 16 rows times 16,000 weights lose
# 2 us. A Q or DQ costs 2 to 5 us for 18,000 values, 14 to 17 for 100,000, 27 to 33 for 200,000; a float Conv between
# int8 ones costs 5 us and 0.2 to 0.6 ns a value more, for two changes of layout. A Conv of 1 channel to 1, with a
# kernel of 256, takes 1.6 ms for 21,922 places in float and 3.9 in int8; 3 channels to 8, 3 x 3 on 224 x 224, 0.09
# and 0.21. PRelu of 68,000 values takes 93 us in float and 60 in int8, as three operators. Softmax of an inner axis
# takes 8 to 9 ns a value in float and 2 in int8 before a Conv, in whose layout that axis comes last. MaxPool takes
# 0.4 to 2 ns a value of its result in float, and in int8 4 to 14 where channels come first. Products of two
# activations, between Transposes that float ones take in, lose 1.5 us and save 0.0015 ns a MAC (AMD Zen 5, attention
# over 28 to 256 places). Float Convs take in a HardSwish, which int8 Convs do not: it takes 7 us of 18,000 values
# there and 54 of 100,000, and in float behind an int8 Conv 26 of 47,000. A Mul of pictures by a value a channel takes
# 15 ns a pixel and 0.2 a value in int8, 0.45 a value in float (AMD Zen 4).
_COSTS = Costs(
    saved_ns_per_mac={
        "Conv": 0.009,
        Kind.DEPTHWISE: -0.01,
        Kind.FEW_ROWS: 0.008,
        "Gemm": 0.035,
        "MatMul": 0.035,
        Kind.OF_ACTIVATIONS: 0.004,
    },
    border_ns=1000,
    border_ns_per_element=0.15,
    layout_ns=2500,
    layout_ns_per_element=0.15,
    saved_ns_and_per_value={
        "HardSwish": (-1000, -0.4),
        "LeakyRelu": (-500, 0),
        "PRelu": (-3000, 0.5),
        Kind.OF_CHANNELS: (0, 0.25),
        Kind.INNER_SOFTMAX: (0, 5.0),
        Kind.CHANNELS_FIRST_POOL: (0, -3.5),
        Kind.OF_ACTIVATIONS: (-1500, 0),
    },
    fused_in_float={"HardSwish": (1500, 0.3), "LeakyRelu": (0, 0.14)},
    copied_ns=0.4,
    pixel_ns=15,
)

# Two threads, AVX2 (AMD Zen 3): a Gemm of 128 rows saves 0.008 ns a MAC, dense Convs 0.001 to 0.02, and small ones of
# large weights (a voice detector's) more. First Convs of 3 channels lose 2 to 5 ms of 1024 x 1024, but in float they
# change the layout of what follows: nets as large are no faster for it, and BlazeFace takes 1.2 ms more.
_COSTS_WITHOUT_VNNI = replace(_COSTS, saved_ns_per_mac={**_COSTS.saved_ns_per_mac, "Gemm": 0.012, "MatMul": 0.012})

# MLAS's kernels that read the picture in place (ConvSym) take multiples of 4 channels and 16 out at least; others first
# copy it, place by place. 3 to 16 channels of 3 x 3 take 5.0 ms and, padded to 4, 2.4 on 1024 x 1024 (Pad: 0.2), 0.23
# and 0.12 on 224 x 224; 8 channels out, or kernels of 11 x 11 at stride 4 and of 16 x 16, gain nothing. 48 x 48 at
# stride 1 gains 16 us, 28 x 28 less than the Pad costs, 5 us. Without VNNI larger kernels than 3 x 3 lose: 7 x 7 on
# 224 x 224 takes 3.0 ms, and with zeros 4.4.
_DENSE_CONVS = DenseConvs(multiple=4, least_outputs=16, largest_kernel=81, least_work=12_000)
_DENSE_CONVS_WITHOUT_VNNI = replace(_DENSE_CONVS, largest_kernel=9)

ORT_CPU = Target(
    name="ort-cpu",
    description="onnxruntime on x86: uint8 activations, int8 weights per channel",
    activation=UINT8,
    weight=INT8_WEIGHT,
    runs_here=True,
    channel_multiple=16,  # else convolutions leave the blocked layout (NCHWc), whose blocks are 8 or 16 channels
    dense_convs=_DENSE_CONVS,
    repeats_pixels=True,
    aborts_at_moved_reads=True,
    quantizes_weights=frozenset({"Conv", "ConvTranspose", "Gemm"}),
    rules=_RULES,
    activations={"uint8": UINT8, "int8": INT8, "uint16": UINT16, "int16": INT16},
    activation_rules=dict.fromkeys(("uint16", "int16"), _RULES_OF_16_BITS),
    block_weights={
        "int4": Blocks(quant_type=UINT4_WEIGHT, sizes=(32, 16, 64, 128, 256), divide=False, may_be_shared=False)
    },
    absorbs_factors=True,
    clips_hide_products=True,
    costs=_COSTS,
    decomposed=frozenset({*_HARD_ACTIVATIONS, "AveragePool"}),
    stays_float={
        "ConvTranspose": "onnxruntime has no int8 kernel for ConvTranspose",
        "LSTM": "onnxruntime has no int8 kernel for LSTM behind Q/DQ",
        "GRU": "onnxruntime has no int8 kernel for GRU behind Q/DQ",
        "RNN": "onnxruntime has no int8 kernel for RNN behind Q/DQ",
        "Einsum": "onnxruntime has no int8 kernel for Einsum",
    },
    lint_rules=ORT_X86_RULES,
    lint_figures=figures,
)

ORT_ARM = replace(
    ORT_CPU,
    name="ort-arm",
    description="onnxruntime on Arm: int8 activations, int8 weights per channel",
    activation=INT8,
    runs_here=False,
    dense_convs=None,
    costs=None,
    lint_rules=ORT_ARM_RULES,
)


def ort_cpu_of_this_machine() -> Target:
    """`ORT_CPU`; where this machine is known to lack VNNI, with weights that cannot saturate and the costs of it."""
    if cpu_has_vnni() is not False:
        return ORT_CPU
    rules = (*ORT_X86_RULES, sums_do_not_saturate)
    return replace(
        ORT_CPU,
        saturates=True,
        costs=_COSTS_WITHOUT_VNNI,
        dense_convs=_DENSE_CONVS_WITHOUT_VNNI,
        notes=(_NO_VNNI,),
        lint_rules=rules,
    )


_NO_VNNI = (
    "this CPU has no VNNI: some weights are rounded more coarsely so that int8 sums cannot saturate "
    "(qdq:reduce_range=off for machines with VNNI)"
)


def cpu_has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether this x86 CPU multiplies uint8 by int8 into 32 bits; None where the system does not tell."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), None)
    return None if flags is None else bool({"avx512_vnni", "avx_vnni"} & set(flags))
