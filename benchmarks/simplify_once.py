"""One model simplified by one tool, in a process of its own so that its peak memory is its own.

    python benchmarks/simplify_once.py TOOL MODEL OUT
    python benchmarks/simplify_once.py versions PACKAGE ...

Prints one JSON line: seconds from reading MODEL to OUT on disk (imports are not counted) and peak resident memory in
MB; or `failed`, what the tool raised; or the version of each package, null where it is missing.
`compare_simplifiers.py` runs it with the interpreter that has the tool, so it imports that tool and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Simplify = Callable[[], object]


def with_graphopt(model: str, out: str, verify: bool = False) -> Simplify:
    """`graphopt optimize MODEL --passes fold --no-verify`."""
    import graphopt

    def simplify() -> None:
        result = graphopt.optimize(model, "fold", verify=verify)
        if failure := result.report.passes[0].failure:  # a pass that breaks the model is rolled back
            raise RuntimeError(failure)
        result.save(out)

    return simplify


def with_verified_graphopt(model: str, out: str) -> Simplify:
    """`graphopt optimize MODEL --passes fold`: checked, and run on two samples before and after."""
    return with_graphopt(model, out, verify=True)


def with_onnxslim(model: str, out: str) -> Simplify:
    """`onnxslim MODEL OUT`."""
    import onnx
    import onnxslim
    import onnxslim.core  # or `slim` would import it while the clock runs

    return lambda: onnx.save(onnxslim.slim(model), out)


def with_onnxsim(model: str, out: str) -> Simplify:
    """`onnxsim MODEL OUT`."""
    import onnx
    from onnxsim import simplify

    return lambda: onnx.save(simplify(onnx.load(model))[0], out)


def with_onnxruntime(model: str, out: str) -> Simplify:
    """Onnxruntime's optimizations that do not depend on the machine, written to a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = out
    return lambda: onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


TOOLS: dict[str, Callable[[str, str], Simplify]] = {
    "graphopt": with_graphopt,
    "graphopt verified": with_verified_graphopt,
    "onnxslim": with_onnxslim,
    "onnxsim": with_onnxsim,
    "onnxruntime": with_onnxruntime,
}


def measure(tool: str, model: str, out: str) -> dict[str, Any]:
    """Run one tool; what it raises is a result too."""
    try:
        simplify = TOOLS[tool](model, out)
        start = time.perf_counter()
        simplify()
        return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}
    except Exception as error:  # each tool has exceptions of its own
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}


def peak_mb() -> float:
    """Peak resident memory of this process; `ru_maxrss` would count the parent's, which forked it, on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Do what the arguments ask for."""
    first, *rest = sys.argv[1:]
    result = {package: version(package) for package in rest} if first == "versions" else measure(first, *rest)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
