"""Values that a pipeline gives to graph inputs: default values from its start on.

So whatever runs the model beside its result, verification, calibration and the last check, runs it with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import PipelineError
from graphopt.feeds import fixed_size
from graphopt.frame import Frame
from graphopt.graph import Array
from graphopt.model_io import Model
from graphopt.sizes import is_typed_tensor, numpy_dtype

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def with_input_values(model: Model, values: Mapping[str, str]) -> Model:
    """Return a copy whose inputs have these values as `give_defaults` gives them; the model itself if there are none.

    Raises:
        PipelineError: as `give_defaults`.
    """
    if not values:
        return model
    copy = model.copy()
    give_defaults(copy.graph, copy.frame, values)
    return copy


def give_defaults(graph: gs.Graph, frame: Frame, values: Mapping[str, str]) -> None:
    """Make numbers, as text by name, the default values of graph inputs of fixed size.

    Raises:
        PipelineError: the graph has no such input, its size is open, or its type does not hold the number.
    """
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    for name, text in values.items():
        if name not in inputs:
            raise PipelineError(f"input '{name}' cannot be {text}: the model's inputs are {', '.join(inputs)}")
        frame.defaults[name] = gs.Constant(name, _filled(inputs[name], text))


def can_be_filled(tensor: gs.Tensor) -> bool:
    """Whether one number can be the value of all of a graph input: its size is fixed, and it holds numbers."""
    return _dtype(tensor) is not None and _has_fixed_size(tensor)


def _filled(tensor: gs.Tensor, text: str) -> Array:
    """An array of the tensor's type and shape that is the same number everywhere."""
    where = f"input '{tensor.name}' cannot be {text}"
    dtype = _dtype(tensor)
    if dtype is None:
        raise PipelineError(f"{where}: it holds no numbers")
    if not _has_fixed_size(tensor):
        raise PipelineError(f"{where}: only inputs of a fixed size are given values")
    try:
        number = _BOOLEANS[text.lower()] if dtype.kind == "b" else float(text) if dtype.kind == "f" else int(text)
    except (KeyError, ValueError):
        raise PipelineError(f"{where}: it takes {dtype.name}") from None
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
        raise PipelineError(f"{where}: it takes {dtype.name}")
    return np.full(tensor.shape, number, dtype)


def _dtype(tensor: gs.Tensor) -> np.dtype[Any] | None:
    dtype = numpy_dtype(tensor.dtype) if is_typed_tensor(tensor) else None
    return dtype if dtype is not None and dtype.kind in "fiub" else None


def _has_fixed_size(tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and all(fixed_size(size) is not None for size in tensor.shape)
