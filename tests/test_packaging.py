"""What is declared about the package is what is on the disk."""

import subprocess
import sys
import tomllib
from pathlib import Path

import graphopt

ROOT = Path(__file__).resolve().parent.parent


def test_the_list_of_packages_is_the_folders_on_the_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {"graphopt"} | {f"graphopt.{path.parent.name}" for path in (ROOT / "graphopt").glob("*/__init__.py")}
    assert set(settings["tool"]["setuptools"]["packages"]) == folders


def test_the_public_names_are_these():
    assert sorted(graphopt.__all__) == [
        "Context",
        "Effect",
        "GraphoptError",
        "Pass",
        "PassManager",
        "PassResult",
        "Result",
        "Skip",
        "__version__",
        "check",
        "inspect",
        "optimize",
    ]
    assert all(hasattr(graphopt, name) for name in graphopt.__all__)


def test_nothing_called_passes_is_installed_at_the_top_level(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ModuleNotFoundError" in done.stderr


def test_importing_graphopt_leaves_heavy_libraries_out():
    code = "import sys, graphopt; print([name for name in ('torch', 'scipy', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
