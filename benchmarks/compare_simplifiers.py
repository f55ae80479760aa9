"""Simplify models with graphopt's `fold` and with other tools: nodes, bytes, seconds, memory, and whether outputs stay.

    pip install onnxslim onnxsim      # here, or for another interpreter: --peer-python PATH
    python benchmarks/compare_simplifiers.py [NAME ...] [--zoo models/zoo] [--markdown OUT.md]
    python benchmarks/compare_simplifiers.py --smoke        # small models, under a minute

The models are those of models/, those that models/fetch.py brought, the full-size topologies of models/topology.py and
the graphs of speed_graphs.py; a NAME may hold wildcards ('fmnist_*'). Every tool has its defaults and runs in a process
of its own. The tools take turns, and the best of up to three rounds counts.

    nodes        nested graphs included, Constant nodes left out; `+n` are operators of the tool's own domain among them
    seconds      from reading the file to the result on disk, without imports
    peak MB      resident memory of the process, the tool's libraries included
    difference   of the outputs on one feed, over the largest magnitude of the output; both models run in onnxruntime
                 with its optimizations off. For integers, the share of values that changed

Exit code 1 where graphopt fails, changes an output, or leaves more nodes than a peer whose outputs are right and
whose operators are ONNX's.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent / "models"))

import topology
from simplify_once import TOOLS
from speed_graphs import GRAPHS, TINY_GRAPHS

from graphopt.data import load_samples
from graphopt.errors import GraphoptError
from graphopt.made_up import made_up_samples
from graphopt.model_io import load_model
from graphopt.protobuf import all_graph_protos
from graphopt.runtime import Session, arrays_in, open_session

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("onnxslim", "onnxsim")  # beside onnxruntime, which graphopt needs anyway
GRAPHOPT = ("graphopt", "graphopt verified")
ROUNDS = 3
ROUNDS_END = 15.0  # seconds of all tools together after which no new round begins
TIMEOUT = 900  # seconds
LARGEST_DIFFERENCE = 1e-3  # in float32, as after a pass that reassociates; float16 gets FLOAT16_DIFFERENCE
FLOAT16_DIFFERENCE = 2e-2
STANDARD = ("", "ai.onnx", "ai.onnx.ml")
NO_FIGURE = "-"

Make = Callable[[Path], Path]  # returns the path of a model, which it puts into the given folder if it is nowhere yet


@dataclass
class Row:
    """What was measured of one tool on one model, or of the model as it came: that has no seconds."""

    failed: str = ""
    nodes: int = 0
    foreign: int = 0  # nodes of a domain that the original does not use
    mb: float = 0.0
    seconds: float | None = None
    peak_mb: float | None = None
    difference: float | None = None
    limit: float = LARGEST_DIFFERENCE

    @property
    def right(self) -> bool:
        """Whether there is a result that computes the same; one that could not be run has the benefit of the doubt."""
        return not self.failed and (self.difference is None or self.difference <= self.limit)


Rows = dict[str, Row]  # by tool; "original" first


def run_once(python: str, *arguments: str) -> dict[str, Any]:
    """What simplify_once.py measured, or why there is nothing."""
    command = [python, str(Path(__file__).with_name("simplify_once.py")), *arguments]
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result after {TIMEOUT} s"}
    except OSError as error:
        return {"failed": f"{python}: {error.strerror}"}
    if done.returncode < 0:
        return {"failed": f"killed by signal {-done.returncode}"}
    try:
        measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit code {done.returncode}"}
    return measured


def compare_on(name: str, model: Path, feeds: Path, pythons: dict[str, str], rounds: int, console: Console) -> Rows:
    """Run every tool on one model, then every result beside the original."""
    rows = {"original": Row(), **{tool: Row() for tool in pythons}}
    with tempfile.TemporaryDirectory() as folder:
        outs = {tool: Path(folder) / f"{number}.onnx" for number, tool in enumerate(pythons)}
        start = time.perf_counter()
        for number in range(rounds):
            if time.perf_counter() - start > ROUNDS_END:
                break
            for tool, python in pythons.items():
                if not rows[tool].failed:
                    outs[tool].unlink(missing_ok=True)
                    measured = run_once(python, tool, str(model), str(outs[tool]))
                    keep_best(rows[tool], measured)
                    told = measured.get("failed") or f"{measured['seconds']:.2f} s"
                    console.print(f"{name} {number + 1}/{rounds}: {tool} {told}", highlight=False, markup=False)
        describe(rows["original"], model, model)
        for tool, out in outs.items():
            describe(rows[tool], out, model)
        compare_outputs(rows, model, outs, feeds)
    return rows


def keep_best(row: Row, measured: dict[str, Any]) -> None:
    """Take in one run: the least of each figure."""
    row.failed = measured.get("failed", "")
    if not row.failed:
        row.seconds = min(measured["seconds"], row.seconds or np.inf)
        row.peak_mb = min(measured["peak_mb"], row.peak_mb or np.inf)


def describe(row: Row, path: Path, original: Path) -> None:
    """Fill in what the file tells."""
    if row.failed:
        return
    try:
        model = onnx.load(path)
    except (OSError, DecodeError) as error:
        row.failed = f"no result that can be read: {type(error).__name__}"
        return
    known = {*STANDARD, *(each.domain for each in onnx.load(original, load_external_data=False).opset_import)}
    nodes = [node for graph in all_graph_protos(model.graph) for node in graph.node if node.op_type != "Constant"]
    row.nodes = len(nodes)
    row.foreign = sum(node.domain not in known for node in nodes)
    row.mb = path.stat().st_size / 1e6


def compare_outputs(rows: Rows, model: Path, outs: dict[str, Path], feeds: Path) -> None:
    """Fill in the differences, on the model's first real feed if there is one, else on one made up from a seed."""
    try:
        reference = open_session(model, optimize=False)
        if feeds.is_dir():
            source = load_samples(feeds, reference.inputs, limit=1)
        else:
            source = made_up_samples(reference, load_model(model).graph, count=1)
        (feed,) = source
        expected = reference.run(feed)
    except GraphoptError:
        return  # nothing to compare on: the figures stay empty
    for tool, out in outs.items():
        row = rows[tool]
        if row.failed:
            continue
        try:
            row.difference, row.limit = largest_difference(expected, run(open_session(out, optimize=False), feed))
        except GraphoptError as error:
            row.failed = f"its result does not run: {error}"


def run(session: Session, feed: dict[str, Any]) -> dict[str, Any]:
    """Run on those arrays of a feed that the model still takes."""
    return session.run({spec.name: feed[spec.name] for spec in session.inputs if spec.name in feed})


def largest_difference(expected: dict[str, Any], found: dict[str, Any]) -> tuple[float, float]:
    """Return the largest difference of any output and what is allowed; infinite where an output is another thing."""
    if expected.keys() != found.keys():
        return np.inf, 0.0
    arrays = [(arrays_in(expected[name]), arrays_in(found[name])) for name in expected]
    if any(len(ours) != len(theirs) for ours, theirs in arrays):
        return np.inf, 0.0
    pairs = [pair for ours, theirs in arrays for pair in zip(ours, theirs, strict=True)]
    is_half = any(one.dtype == np.float16 for one, _ in pairs)
    worst = max((difference(one, other) for one, other in pairs), default=0.0)
    return worst, FLOAT16_DIFFERENCE if is_half else LARGEST_DIFFERENCE


def difference(expected: Any, found: Any) -> float:
    """Return max |x - y| / max |x| over the finite elements, for other types than floats the share that differ.

    One step of float32 beside 1 is no difference: a probability near 0 is no more precise.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return np.inf
    if expected.dtype.kind != "f":
        return float(np.mean(expected != found)) if expected.size else 0.0
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return np.inf
    wide, other = expected[finite].astype(np.float64), found[finite].astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0))
    error = max(0.0, float(np.abs(wide - other).max(initial=0.0)) - float(np.finfo(np.float32).eps))
    return error / largest if largest else (np.inf if error else 0.0)


def problems(name: str, rows: Rows) -> Iterator[str]:
    """Yield what is wrong with graphopt's results on one model."""
    peers = {
        tool: row.nodes
        for tool, row in rows.items()
        if tool not in (*GRAPHOPT, "original") and row.right and not row.foreign
    }
    for tool in GRAPHOPT:
        row = rows[tool]
        if row.failed:
            yield f"{name}: {tool} failed: {row.failed}"
        elif not row.right:
            yield f"{name}: {tool} changed the outputs by {row.difference:.1e}"
    best = min(peers, key=peers.__getitem__, default=None)
    if best is not None and rows["graphopt"].right and rows["graphopt"].nodes > peers[best]:
        yield f"{name}: graphopt leaves {rows['graphopt'].nodes} nodes, {best} {peers[best]}"


def summary(results: dict[str, Rows]) -> str:
    """One sentence, and one for each problem."""
    found = {name: list(problems(name, rows)) for name, rows in results.items()}
    good = sum(not each for each in found.values())
    unknown = [name for name, rows in results.items() if rows["graphopt"].difference is None and not found[name]]
    lines = [
        f"graphopt keeps the outputs and leaves no more nodes than any other tool on {good} of {len(found)} models."
    ]
    lines += [f"- {name}: outputs were not compared: no feed that it runs on" for name in unknown]
    return "\n".join([*lines, *(f"- {problem}" for each in found.values() for problem in each)])


def nodes_cell(row: Row) -> str:
    """Nodes, or why there are none."""
    if row.failed:
        return f"failed: {row.failed[:80].replace('|', '/')}"
    return f"{row.nodes} (+{row.foreign})" if row.foreign else str(row.nodes)


def figure_cell(value: float | None, digits: int) -> str:
    """A figure, if there is one."""
    return NO_FIGURE if value is None else f"{value:.{digits}f}"


def difference_cell(row: Row) -> str:
    """The difference, with a mark where it is no rounding."""
    if row.difference is None:
        return NO_FIGURE
    return f"{row.difference:.1e}" if row.right else f"{row.difference:.1e} WRONG"


MEASURES: dict[str, Callable[[Row], str]] = {
    "nodes": nodes_cell,
    "MB": lambda row: NO_FIGURE if row.failed else f"{row.mb:.3f}",
    "seconds": lambda row: figure_cell(row.seconds, 2),
    "peak MB": lambda row: figure_cell(row.peak_mb, 0),
    "difference": difference_cell,
}
WITH_ORIGINAL = ("nodes", "MB")


def table_rows(measure: str, results: dict[str, Rows]) -> list[list[str]]:
    """One table's header and lines: a line for each model, a column for each tool."""
    tools = [tool for tool in next(iter(results.values())) if tool != "original" or measure in WITH_ORIGINAL]
    cell = MEASURES[measure]
    return [[measure, *tools], *([name, *(cell(rows[tool]) for tool in tools)] for name, rows in results.items())]


def show(results: dict[str, Rows], console: Console) -> None:
    """Print a table for each measure."""
    for measure in MEASURES:
        (_, *tools), *lines = table_rows(measure, results)
        table = Table(title=measure, title_justify="left")
        table.add_column("model", no_wrap=True)
        for tool in tools:
            table.add_column(tool, justify="right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def markdown(results: dict[str, Rows], header: str) -> str:
    """Return the same tables for a file."""
    parts = [header]
    for measure in MEASURES:
        head, *lines = table_rows(measure, results)
        rule = ["---", *["---:"] * (len(head) - 1)]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)))
    return "\n\n".join([*parts, summary(results)]) + "\n"


def existing(path: Path) -> Make:
    """A model that is there."""
    return lambda _folder: path


def saved(name: str, build: Callable[[], onnx.ModelProto]) -> Make:
    """A model that is built."""

    def make(folder: Path) -> Path:
        path = folder / f"{name}.onnx"
        onnx.save(build(), path)
        return path

    return make


def all_models(zoo: Path, smoke: bool) -> dict[str, Make]:
    """How to make each model, by name."""
    files = sorted((ROOT / "models").glob("*.onnx")) + ([] if smoke else sorted((zoo / "models").glob("*.onnx")))
    graphs = TINY_GRAPHS if smoke else {name: partial(topology.build, name) for name in topology.available()} | GRAPHS
    return {path.stem: existing(path) for path in files} | {name: saved(name, build) for name, build in graphs.items()}


def interpreters(peer_python: str, console: Console) -> tuple[dict[str, str], str]:
    """Return the interpreter of each tool that is there, and a line with their versions."""
    own = run_once(sys.executable, "versions", "graphopt", "onnxruntime", "onnx")
    theirs = run_once(peer_python, "versions", *PEERS)
    missing = [peer for peer in PEERS if not theirs.get(peer)]
    if missing:
        reason = f" ({theirs['failed']})" if "failed" in theirs else ""
        console.print(
            f"not compared with {' and '.join(missing)}, which {peer_python} does not have{reason}: "
            f"pip install {' '.join(missing)}, or give --peer-python",
            highlight=False,
            soft_wrap=True,
        )
    pythons = {tool: peer_python if tool in PEERS else sys.executable for tool in TOOLS if tool not in missing}
    found = own | {peer: theirs[peer] for peer in PEERS if peer not in missing}
    versions = ", ".join(f"{package} {version}" for package, version in found.items())
    return pythons, f"{versions}; Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}"


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all models")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo", help="default: models/zoo")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has onnxslim and onnxsim")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too, after each model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--smoke", action="store_true", help="small models, one round")
    arguments = parser.parse_args()
    models = all_models(arguments.zoo, arguments.smoke)
    patterns = arguments.names or ["*"]
    chosen = [name for name in models if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"no model {' '.join(patterns)}; there are: {', '.join(models)}")
    messages = Console(stderr=True)
    pythons, header = interpreters(arguments.peer_python, messages)
    results: dict[str, Rows] = {}
    rounds = 1 if arguments.smoke else arguments.rounds
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            model = models[name](Path(folder))
            feeds = arguments.zoo / "feeds" / name / "evaluation"
            results[name] = compare_on(name, model, feeds, pythons, rounds, messages)
        if arguments.markdown:
            arguments.markdown.write_text(markdown(results, header), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(header, highlight=False, soft_wrap=True)
    show(results, console)
    console.print(summary(results), highlight=False, soft_wrap=True)
    return int(any(True for name, rows in results.items() for _ in problems(name, rows)))


if __name__ == "__main__":
    sys.exit(main())
