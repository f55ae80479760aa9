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

NEVER_NEGATIVE = frozenset({"Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"})
"""Operators whose result is not below zero; Abs is none: it leaves the lowest integer as it is."""
