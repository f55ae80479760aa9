"""The runtimes and devices that Q/DQ graphs are made for, by name.

Third parties add theirs through the entry-point group `graphopt.targets`: name = "module:attribute", where the
attribute is a `Target` of that name or a function that returns one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import entry_points

from graphopt.errors import GraphoptError
from graphopt.targets.ort_cpu import ORT_ARM, ort_cpu_of_this_machine
from graphopt.targets.target import Blocks, Costs, DenseConvs, Kind, Role, Rule, Target
from graphopt.targets.tensorrt import TENSORRT

__all__ = [
    "Blocks",
    "Costs",
    "DenseConvs",
    "Kind",
    "Role",
    "Rule",
    "Target",
    "target_named",
    "targets",
]

_OWN: dict[str, Callable[[], Target]] = {
    "ort-cpu": ort_cpu_of_this_machine,
    "ort-arm": lambda: ORT_ARM,
    "tensorrt": lambda: TENSORRT,
}


@cache
def targets() -> Mapping[str, Callable[[], Target]]:
    """What gives each target, by name: graphopt's own, then those of installed packages.

    Raises:
        GraphoptError: a package's target cannot be imported, or takes a name that is taken.
    """
    table = dict(_OWN)
    for entry in entry_points(group="graphopt.targets"):
        try:
            found = entry.load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise GraphoptError(f"target '{entry.name}' ({entry.value}) cannot be imported: {error}") from error
        if entry.name in table:
            raise GraphoptError(f"target '{entry.name}' ({entry.value}) takes a name that is taken")
        table[entry.name] = partial(_itself, found) if isinstance(found, Target) else found
    return table


def _itself(target: Target) -> Target:
    return target


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        GraphoptError: there is none; the message lists those that there are. Or what a package gives is no target of
            that name.
    """
    table = targets()
    if name not in table:
        raise GraphoptError(f"no target is called '{name}'; there are: {', '.join(table)}")
    found = table[name]()
    if not isinstance(found, Target) or found.name != name:
        raise GraphoptError(f"what is registered as target '{name}' is no graphopt.targets.Target of that name")
    return found
