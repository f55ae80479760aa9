"""Constant values as a model file stores them, and the way back to a TensorProto.

graphsurgeon keeps a weight as `LazyValues` until a pass reads it. The subclasses here add what its own lacks:
weights in files beside the model (mapped, never read whole), the true numpy type of bfloat16, float8 and
packed types, and sparse tensors with their type. Arrays come back read-only where that saves a copy: the
clones of a graph share their weights.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphopt.errors import ModelError
from graphopt.protobuf import without

Array = NDArray[Any]

_BITS = {  # of the types that share a byte; every other type fills whole bytes
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    getattr(TensorProto, "INT2", -1): 2,  # since onnx 1.20
    getattr(TensorProto, "UINT2", -2): 2,
}

LENGTH_OF_START = 1024
"""Bytes of a weight that `StoredTensor.start` holds."""

VALUE_FIELDS = (  # of a TensorProto; the others describe it
    *("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"),
    *("external_data", "data_location", "segment"),
)


class StoredTensor(LazyValues):  # type: ignore[misc]  # graphsurgeon ships no types
    """The values of a TensorProto, in memory or in a file beside the model; the proto is never written to.

    Attributes:
        tensor: the TensorProto.
        shape, dtype, nbytes: of the array that `load` returns; dtype is numpy's or ml_dtypes'.
        file: the file that holds the values, None when the proto holds them itself.

    """

    def __init__(self, tensor: TensorProto, folder: Path | None = None) -> None:
        self.tensor = tensor
        self.shape = list(tensor.dims)
        self.dtype = _dtype_of(tensor)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.file, self._offset = _location(tensor, folder)

    def load(self) -> Array:
        """Return the values; those of a file are mapped, not read, unless their type is packed.

        Raises:
            ModelError: the model does not hold as many values as the shape asks for.

        """
        if self.file is None:
            return self._held_values()
        if self.tensor.data_type in _BITS or self.nbytes == 0:
            return numpy_helper.to_array(self.inline())
        return np.memmap(self.file, self.dtype, "r", self._offset, tuple(self.shape))

    def _held_values(self) -> Array:
        try:
            return numpy_helper.to_array(self.tensor)
        except (TypeError, ValueError) as error:
            raise ModelError(f"weight {self.tensor.name!r} is damaged: {error}; export the model again") from error

    @cached_property
    def start(self) -> bytes:
        """The first bytes of the values, at most `LENGTH_OF_START`."""
        if self.file is None and self.tensor.HasField("raw_data") and self.tensor.data_type not in _BITS:
            return self.tensor.raw_data[:LENGTH_OF_START]
        return np.ascontiguousarray(self.load()).reshape(-1).view(np.uint8)[:LENGTH_OF_START].tobytes()

    def inline(self) -> TensorProto:
        """Return a copy of the tensor that holds its values itself."""
        if self.file is None:
            return without(self.tensor)
        copy = without(self.tensor, *VALUE_FIELDS)
        with self.file.open("rb") as file:
            file.seek(self._offset)
            copy.raw_data = file.read(stored_bytes(self.tensor))
        return copy

    def check_file(self) -> None:
        """Refuse a file that is missing or too short to hold the values.

        Raises:
            ModelError: with the name of the tensor and of the file.

        """
        if self.file is None:
            return
        if not self.file.is_file():
            raise ModelError(
                f"{self.file}: no such file, but the model keeps the weight {self.tensor.name!r} in it; "
                "put it back beside the model"
            )
        if self.file.stat().st_size < self._offset + stored_bytes(self.tensor):
            raise ModelError(f"{self.file}: too short for the weight {self.tensor.name!r}; copy it again")


class StoredSparseTensor(LazyValues):  # type: ignore[misc]  # graphsurgeon ships no types
    """The values of a SparseTensorProto; `load` returns the dense array, `tensor` keeps the sparse form."""

    def __init__(self, tensor: onnx.SparseTensorProto) -> None:
        self.tensor = tensor
        self.shape = list(tensor.dims)
        self.dtype = helper.tensor_dtype_to_np_dtype(tensor.values.data_type)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Array:
        """Return the dense array; the indices are linear ([NNZ]) or coordinates ([NNZ, rank])."""
        dense = np.zeros(self.shape, self.dtype)
        indices = numpy_helper.to_array(self.tensor.indices)
        values = numpy_helper.to_array(self.tensor.values)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        return dense


def stored_values(values: Any, folder: Path | None) -> Any:
    """Replace graphsurgeon's lazy values by ours; arrays and our own pass through."""
    if isinstance(values, StoredTensor | StoredSparseTensor) or not isinstance(values, LazyValues):
        return values
    if isinstance(values.tensor, onnx.SparseTensorProto):
        return StoredSparseTensor(values.tensor)
    return StoredTensor(values.tensor, folder)


def stored_bytes(tensor: TensorProto) -> int:
    """Return the number of bytes that a tensor's values fill in a file, packed types packed."""
    bits = _BITS.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(-(-math.prod(tensor.dims) * bits // 8))


def nbytes_of(values: Any) -> int:
    """Return the number of bytes that the values of a constant fill in a file, whether read already or not."""
    return stored_bytes(values.tensor) if isinstance(values, StoredTensor) else int(values.nbytes)


def is_packed(data_type: int) -> bool:
    """Whether values of an ONNX type share bytes in a file."""
    return data_type in _BITS


def data_type_of(constant: gs.Constant) -> int:
    """Return the ONNX type that the values of a constant have.

    Raises:
        ModelError: ONNX has no such type.

    """
    dtype = np.dtype(constant.dtype)
    if dtype.kind == "U":
        return TensorProto.STRING
    try:
        return helper.np_dtype_to_tensor_dtype(dtype)
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"constant {constant.name!r}: ONNX has no type for numpy's {dtype}; use another type"
        ) from error


def tensor_proto(constant: gs.Constant) -> TensorProto:
    """Return the constant as a TensorProto of its own that holds its values, whatever their type.

    Raises:
        ModelError: the type has no ONNX equivalent.

    """
    values = constant._values
    if isinstance(values, StoredTensor):
        tensor = values.inline()
    elif isinstance(values, LazyValues) and isinstance(values.tensor, TensorProto):
        tensor = without(values.tensor)
    else:
        tensor = _from_array(constant)
    tensor.name = constant.name
    return tensor


def _from_array(constant: gs.Constant) -> TensorProto:
    array = np.asarray(constant.values)
    wanted = constant._export_dtype
    if wanted is not None:
        array = array.astype(helper.tensor_dtype_to_np_dtype(wanted) if isinstance(wanted, int) else wanted)
    data_type_of(constant)  # refuses what from_array cannot name
    return numpy_helper.from_array(array)


def _dtype_of(tensor: TensorProto) -> np.dtype[Any]:
    try:
        return helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError as error:
        raise ModelError(
            f"weight {tensor.name!r} has the type {tensor.data_type}, which onnx {onnx.__version__} does not know"
        ) from error


def _location(tensor: TensorProto, folder: Path | None) -> tuple[Path | None, int]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return None, 0
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = entries.get("location", "")
    if folder is None:
        raise ModelError(
            f"weight {tensor.name!r} is kept in the file {name!r}, whose folder a ModelProto does not tell; "
            "give the path of the model, or load the ModelProto with its external data"
        )
    if not name or PureWindowsPath(name).is_absolute() or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ModelError(
            f"weight {tensor.name!r} is kept in {name!r}, outside the model's folder; "
            "move the file beside the model and save the model again with a plain file name"
        )
    offset = entries.get("offset", "0")
    if not offset.isdecimal():
        raise ModelError(f"weight {tensor.name!r} is kept in {name!r} at {offset!r}, which is no place in a file")
    return folder / name, int(offset)
