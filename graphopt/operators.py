"""What is known of ONNX operators by their names alone (https://onnx.ai/onnx/operators/)."""

from __future__ import annotations

RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",  # where it is not random it is an identity: remove-identities
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
"""Operators that may give another result the next time."""

QUANTIZING = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
"""Operators that say how a tensor is stored or computed, and must stay where they are."""

MOVING = frozenset(
    {"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators whose result holds elements of their first input, each as it is."""

ELEMENTWISE = frozenset(
    {
        *("Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg"),
        *("PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
        *("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum", "Where"),
    }
)
"""Operators whose result in a place depends on the values of its inputs in that place alone."""

MIXING = frozenset({"AveragePool", "Concat", "GlobalMaxPool", "MaxPool", "Resize", "Split"})
"""Operators whose result holds elements of their inputs, or values between those of a channel nearby."""

NEVER_NEGATIVE = frozenset({"Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"})
"""Operators whose result is not below zero; Abs is none: it leaves the lowest integer as it is."""
