"""Models in and out: a path, a ModelProto or a `gs.Graph` becomes a `Model`, and a `Model` becomes a file.

Everything that graphsurgeon has no place for travels in the model's `Frame`. Weights in files beside the
model are mapped, and a result that would pass protobuf's limit of 2 GB gets its weights in one file beside
it; no protobuf larger than that is ever serialized. A file is written whole or not at all, and never over
an input.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from graphopt.errors import ModelError, OutputError
from graphopt.files import atomic_path
from graphopt.frame import Frame
from graphopt.garbage import rare_collections
from graphopt.graph import constants_in
from graphopt.graph_copy import copy_graph
from graphopt.graph_export import export_model
from graphopt.graph_import import import_model, without_weights
from graphopt.model_writer import write_model
from graphopt.protobuf import without
from graphopt.stored_values import VALUE_FIELDS, StoredTensor, nbytes_of, stored_bytes, tensor_proto

PROTOBUF_LIMIT = 2**31 - 2**20  # bytes; what is left of 2 GiB is room for the graph's own growth
_BESIDE_THRESHOLD = 1024  # bytes; a smaller weight stays in the model file, as with onnx.save_model
_ALIGNMENT = 4096  # bytes; a page, so that runtimes can map each weight

G_LOGGER.severity = G_LOGGER.ERROR  # it prints each numpy type that it does not know


@dataclass
class Model:
    """A graph and what `gs.Graph` has no place for.

    Attributes:
        graph: the graph; passes change it in place.
        frame: metadata, doc strings and the rest; see `graphopt.frame`.
        path: the file it was loaded from, None for a ModelProto or a graph.
        files: all files it was loaded from, those with weights included; none of them is ever written.

    """

    graph: gs.Graph = field(repr=False)
    frame: Frame = field(default_factory=Frame, repr=False)
    path: Path | None = None
    files: tuple[Path, ...] = ()

    @rare_collections()
    def copy(self) -> Model:
        """Return a clone that shares the weights, which are never written in place, and nothing else."""
        return Model(copy_graph(self.graph), self.frame.copy(), self.path, self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct weights, those of branches, bodies and functions and default values included."""
        constants = (*_constants(self.graph), *self.frame.defaults.values())
        values = {id(constant._values): constant._values for constant in constants}
        return sum(map(nbytes_of, values.values()))

    def to_proto(self) -> onnx.ModelProto:
        """Return a ModelProto that holds all weights itself; in memory it may pass 2 GB.

        Raises:
            ModelError: the graph has a cycle, or a value that ONNX cannot express.

        """
        return export_model(self.graph, self.frame)


Source: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | gs.Graph | Model


@rare_collections()
def load_model(source: Source) -> Model:
    """Load a model; one that is loaded already is returned itself.

    Weights are read when a pass asks for them; those in files beside the model are mapped. A ModelProto is
    not copied as far as weights go and must stay as it is while the Model is used; a `gs.Graph` becomes the
    Model's graph itself. An initializer that is a graph input too may be overridden by callers from IR 4
    on: it becomes a plain input whose default is in `frame.defaults`; before IR 4 it is a constant, as for
    onnxruntime.

    Raises:
        ModelError: the file is missing, is no ONNX model, is damaged, or lacks a file of weights beside it.

    """
    if isinstance(source, Model):
        return source
    if isinstance(source, gs.Graph):
        return Model(source)
    if isinstance(source, onnx.ModelProto):
        return Model(*import_model(source, None, owned=False))
    path = Path(source)
    proto = _read_proto(path)
    try:
        graph, frame = import_model(proto, path.parent, owned=True)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return Model(graph, frame, path, (path, *_weight_files(graph, frame)))


def _read_proto(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give the .onnx file in it")
    try:
        if path.stat().st_size >= 2**31:
            raise ModelError(f"{path}: larger than 2 GB, which no protobuf can be; it is damaged or no ONNX model")
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if not content:
        raise ModelError(f"{path}: is empty; export or download the model again")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(
            memoryview(content)
        )  # parsed from the file itself: no copy in memory
    except DecodeError:
        raise ModelError(f"{path}: {_what_it_is(content[:1024])}") from None
    if not proto.HasField("graph") or (proto.ir_version >= 3 and not proto.opset_import):
        raise ModelError(f"{path}: {_what_it_is(content[:1024])}")
    return proto


def _what_it_is(start: bytes) -> str:
    """Say what a file that is no model seems to be, from its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model; run `git lfs pull`"
    try:
        start.decode("ascii")
    except UnicodeDecodeError:
        return "is no ONNX model, or its end is missing; export or download it again"
    return "is a text file, not an ONNX model; give the binary .onnx file"


@rare_collections()
def save_model(
    model: Model | onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    protect: Collection[str | os.PathLike[str]] = (),
) -> None:
    """Write a model, whole or not at all.

    The result is one file. Where that would pass 2 GB, weights of at least 1 KB go to `<file name>.data`
    beside it, which is written first. `protect` are files that must never be written, whatever `overwrite`
    says; the file that the model was loaded from, and those with its weights, are protected anyway.

    Raises:
        OutputError: the file exists and `overwrite` is false, it is protected, or it cannot be written; no
            file is left behind.
        ModelError: the graph cannot be expressed in ONNX.

    """
    target = Path(path)
    protected = [Path(each) for each in protect]
    if isinstance(model, Model):
        protected += [*model.files, *_weight_files(model.graph, model.frame)]
    refuse_target(target, overwrite=overwrite, protect=protected)
    if fits_one_file(model):
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            if isinstance(model, Model):
                write_model(file, model.graph, model.frame)
            else:
                file.write(model.SerializeToString())
        return
    data = target.with_name(target.name + ".data")
    refuse_target(data, overwrite=overwrite, protect=protected)
    is_new = not data.exists()
    try:
        with atomic_path(target) as temporary, atomic_path(data) as temporary_data:
            with temporary_data.open("wb") as file:
                proto = _with_weights_in(file, data.name, model)
            temporary.write_bytes(proto.SerializeToString())
    except OutputError:
        if is_new:  # the weights took their name before the model failed to
            data.unlink(missing_ok=True)
        raise


def refuse_target(target: Path, *, overwrite: bool = False, protect: Collection[str | os.PathLike[str]] = ()) -> None:
    """Refuse to write where an input is, or where any file is unless `overwrite`: before work starts, too.

    Raises:
        OutputError: `target` is one of `protect`, or exists, or is no regular file; or there is no folder for
            it that may be written to.

    """
    # what gets written is what a link points to
    folder = Path(os.path.realpath(target)).parent if target.is_symlink() else target.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {target}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {target}: the folder {folder} cannot be written to")
    if not target.exists():
        return
    if any(Path(each).exists() and target.samefile(each) for each in protect):
        raise OutputError(f"cannot write {target}: it is an input; give the output another name")
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder; give the name of a file in it")
    if not target.is_file():
        raise OutputError(f"cannot write {target}: it is not a regular file")
    if not overwrite:
        raise OutputError(f"cannot write {target}: it exists already; give another name or --overwrite")


def _weight_files(graph: gs.Graph, frame: Frame) -> list[Path]:
    values = (constant._values for constant in (*_constants(graph), *frame.defaults.values()))
    return list({each.file: None for each in values if isinstance(each, StoredTensor) and each.file})


def fits_one_file(model: Model | onnx.ModelProto) -> bool:
    """Whether a model with all its weights stays below the size that a protobuf can have."""
    if isinstance(model, onnx.ModelProto):
        weights = sum(stored_bytes(tensor) for tensor in model.graph.initializer)
        return bool(weights + without_weights(model).ByteSize() < PROTOBUF_LIMIT)
    return model.nbytes < PROTOBUF_LIMIT


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    return [constant for each in (graph, *graph.functions) for constant in constants_in(each)]


def _with_weights_in(file: BinaryIO, name: str, model: Model | onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its larger weights written to `file`, which it knows as `name`."""

    def beside(tensor: TensorProto) -> TensorProto:
        if tensor.data_type == TensorProto.STRING or stored_bytes(tensor) < _BESIDE_THRESHOLD:
            return tensor
        content = tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        file.write(bytes(-file.tell() % _ALIGNMENT))
        moved = without(tensor, *VALUE_FIELDS)
        moved.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", file.tell()), ("length", len(content))):
            moved.external_data.add(key=key, value=str(value))
        file.write(content)
        return moved

    if isinstance(model, Model):
        return export_model(model.graph, model.frame, lambda constant: beside(tensor_proto(constant)))
    shell = without_weights(model)
    shell.graph.initializer.extend(beside(tensor) for tensor in model.graph.initializer)
    return shell
