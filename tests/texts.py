"""Models from ONNX text, with seeded weights where the text gives only a type."""

import math

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper


def model_of(text: str, seed: int = 0) -> onnx.ModelProto:
    """The model of a text; what it declares in `<...>` without a value becomes a weight of variance 2 / fan-in."""
    model = onnx.parser.parse_model(text)
    graph = model.graph
    computed = {name for node in graph.node for name in node.output}
    declared = [info for info in graph.value_info if info.name not in computed]
    rng = np.random.default_rng(seed)
    for info in declared:
        shape = [size.dim_value for size in info.type.tensor_type.shape.dim]
        scale = math.sqrt(2 / max(1, math.prod(shape[1:])))
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, info.name))
        graph.value_info.remove(info)
    return model
