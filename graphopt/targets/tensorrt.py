"""TensorRT's explicit quantization: symmetric int8, zero point 0, quantizers on the inputs of weighted operators.

Sources: the developer guide's "Explicit quantization" chapter, the comments on IQuantizeLayer and IDequantizeLayer in
NvInfer.h, and the placement of NVIDIA's Model Optimizer (its minimum sizes, and its choice of the residual branch).
Weights stay float behind Q and DQ, which every TensorRT version with explicit quantization reads.
"""

from __future__ import annotations

from dataclasses import replace

from graphopt.quantization import FLOAT8_E4M3, INT4_WEIGHT, INT8_SYMMETRIC, INT8_WEIGHT
from graphopt.targets.target import Blocks, Role, Rule, Target
from graphopt.targets.tensorrt_build import TENSORRT_BUILD, figures
from graphopt.targets.tensorrt_errors import TENSORRT_ERRORS
from graphopt.targets.tensorrt_infos import TENSORRT_INFOS
from graphopt.targets.tensorrt_warnings import TENSORRT_WARNINGS

_WEIGHTED = Rule(
    role=Role.GAINS,
    inputs=(0, 1),
    per_channel=True,
    needs_constant_weight=True,
    needs_output=False,
    minimum_channels=16,
)

_RULES = {
    "Conv": replace(_WEIGHTED, pads_inputs=True, minimum_grouped_kernel=3),
    # per-channel ConvTranspose weights are accepted by some versions only: one scale
    "ConvTranspose": replace(_WEIGHTED, per_channel=False),
    "Gemm": replace(_WEIGHTED, attributes={"transA": 0, "beta": 1}, needs_rows=True),
    "MatMul": replace(_WEIGHTED, needs_constant_weight=False, needs_rows=True),
}

# As NVIDIA's Model Optimizer places float8: no Conv with fewer channels on a side (in a group), or a larger kernel.
_FLOAT8_RULES = {
    "Conv": replace(_WEIGHTED, largest_kernel=32, counts_groups_alone=True),
    "Gemm": _RULES["Gemm"],
    "MatMul": _RULES["MatMul"],
}

TENSORRT = Target(
    name="tensorrt",
    description="TensorRT: symmetric int8, zero point 0, weights per channel",
    activation=INT8_SYMMETRIC,
    weight=INT8_WEIGHT,
    activations={"int8": INT8_SYMMETRIC, "float8e4m3": FLOAT8_E4M3},
    activation_rules={"float8e4m3": _FLOAT8_RULES},
    block_weights={"int4": Blocks(quant_type=INT4_WEIGHT, sizes=(128, 64), divide=True, may_be_shared=True)},
    rules=_RULES,
    stays_float={
        "LSTM": "TensorRT runs LSTM in float",
        "GRU": "TensorRT runs GRU in float",
        "RNN": "TensorRT runs RNN in float",
        "Einsum": "TensorRT fuses no Q/DQ into Einsum",
    },
    quantizes_outputs=False,
    adds_fused_into=frozenset({"Conv"}),
    channel_multiple=8,
    stores_int8_weights=False,
    lint_rules=(*TENSORRT_ERRORS, *TENSORRT_WARNINGS, *TENSORRT_INFOS, *TENSORRT_BUILD),
    lint_figures=figures,
)
