"""What `fold,prune:ratio=0.5` leaves of each open model: groups, parameters, MACs, and why the rest stays.

    python benchmarks/zoo_pruning.py FOLDER

FOLDER holds what models/fetch.py brings. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from graphopt.channel_groups import ChannelGroups
from graphopt.channels import find_groups
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import Fold, FreezeInputs, Prune


def costs(groups: ChannelGroups) -> tuple[float, float]:
    """MACs and parameters."""
    nothing = np.zeros(groups.count, bool)
    return groups.cost("macs", nothing), groups.cost("params", nothing)


def kind_of(reason: str) -> str:
    """A reason without the names in it."""
    if reason.startswith("it is the graph"):
        return "graph " + reason.split()[4]
    if reason.startswith("the same axes"):
        return "cut through another factor"
    return f"{reason.split()[0]}" if reason[0].isupper() else reason.split(":")[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print("| model | groups | cut | parameters left | MACs left | left alone because of |\n|---|---|---|---|---|---|")
    for path in sorted(parser.parse_args().folder.glob("*.onnx")):
        model = load_model(path)
        context = Context(frame=model.frame)
        FreezeInputs().apply(model.graph, context)
        Fold().apply(model.graph, context)
        before = find_groups(model.graph)
        result = Prune(ratio=0.5).apply(model.graph, context)
        shares = [
            f"{new / old:.0%}" if old else "-"
            for old, new in zip(costs(before), costs(find_groups(model.graph)), strict=True)
        ]
        kinds = Counter(kind_of(skip.reason) for skip in result.skipped)
        why = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
        cut = result.parts.get("groups cut", 0)
        print(f"| {path.stem} | {len(before.groups)} | {cut} | {shares[1]} | {shares[0]} | {why} |", flush=True)


if __name__ == "__main__":
    main()
