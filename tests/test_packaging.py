"""What is declared about the package is what is on the disk."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import graphopt

ROOT = Path(__file__).resolve().parent.parent


def test_the_list_of_packages_is_the_folders_on_the_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {"graphopt"} | {f"graphopt.{path.parent.name}" for path in (ROOT / "graphopt").glob("*/__init__.py")}
    assert set(settings["tool"]["setuptools"]["packages"]) == folders


def test_the_link_for_tools_leads_to_the_folder_that_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (mapped,) = settings["tool"]["setuptools"]["package-dir"].values()
    assert (ROOT / "graphopt" / "passes").is_symlink()
    assert (ROOT / "graphopt" / "passes").resolve() == ROOT / mapped


def test_type_checkers_of_users_find_the_types():
    assert (Path(graphopt.__file__).parent / "py.typed").is_file()


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    libraries_of_users = [
        *project["dependencies"],
        *(each for extra in ("images", "dask") for each in project["optional-dependencies"][extra]),
    ]
    declared = {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in libraries_of_users}
    imported = set()
    for path in [*(ROOT / "graphopt").rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    called = {"google": "protobuf", "PIL": "pillow"}  # modules that are not called like their package
    libraries = imported - set(sys.stdlib_module_names) - {"graphopt"}
    assert {called.get(name, name) for name in libraries} == declared


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "models/README.md"])
def test_files_that_a_page_links_to_exist(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!\w+://)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_public_names_are_these():
    assert sorted(graphopt.__all__) == [
        "Context",
        "Effect",
        "GraphoptError",
        "Pass",
        "PassManager",
        "PassResult",
        "Preprocess",
        "Result",
        "Skip",
        "__version__",
        "calibrate",
        "channel_groups",
        "check",
        "inspect",
        "lint",
        "optimize",
    ]
    assert all(hasattr(graphopt, name) for name in graphopt.__all__)


def test_nothing_called_passes_is_installed_at_the_top_level(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ModuleNotFoundError" in done.stderr


def test_importing_graphopt_leaves_heavy_libraries_out():
    code = "import sys, graphopt; print([name for name in ('torch', 'scipy', 'pandas', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
