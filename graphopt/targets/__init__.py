"""The runtimes and devices that Q/DQ graphs are made for, by name."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.errors import GraphoptError
from graphopt.targets.ort_cpu import ORT_ARM, ort_cpu_of_this_machine
from graphopt.targets.target import Costs, Role, Rule, Target
from graphopt.targets.tensorrt import TENSORRT

__all__ = ["TARGETS", "Costs", "Role", "Rule", "Target", "target_named"]

TARGETS: dict[str, Callable[[], Target]] = {
    "ort-cpu": ort_cpu_of_this_machine,
    "ort-arm": lambda: ORT_ARM,
    "tensorrt": lambda: TENSORRT,
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        GraphoptError: there is none; the message lists those that there are.
    """
    if name not in TARGETS:
        raise GraphoptError(f"no target is called '{name}'; there are: {', '.join(TARGETS)}")
    return TARGETS[name]()
