"""Where pairs go in a graph of which calibration has seen a part: operators that need other ranges stay float."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graphopt.errors import PipelineError
from graphopt.placement import Placement, place_all
from graphopt.ranges import Ranges
from graphopt.targets import Target

_UNSEEN = "no sample took the branch {} in calibration, so it has no ranges: calibrate on samples that do"


def place_calibrated(
    graph: gs.Graph, target: Target, excluded: dict[int, str], ranges: Ranges
) -> tuple[Placement, ...]:
    """The placements, as `place_all` has them, over tensors whose ranges are known.

    Args:
        graph: as `place_all`.
        target: the table to follow.
        excluded: by id of a node, why it must stay float; gains the operators that need a range which is not known.
        ranges: what calibration found.

    Raises:
        PipelineError: no range fits the graph.
    """
    placements = place_all(graph, target, excluded)
    wanted = [name for each in placements for name in each.observed]
    if wanted and ranges.tensors and not any(name in ranges.tensors for name in wanted):
        raise PipelineError(
            f"the ranges are of another model: none is called like this one's tensors ({wanted[0]}, ...)"
        )
    for placement in placements:
        if _is_unseen(placement, ranges):
            excluded |= {id(node): _UNSEEN.format(placement.branch) for node in placement.nodes}
    while missing := [
        (placement.users[name], activation.range_name)
        for placement in placements
        for name, activation in placement.activations.items()
        if activation.range_name not in ranges.tensors
    ]:
        for users, name in missing:
            for node in users:
                excluded.setdefault(id(node), f"no range is known for {name}")
        placements = place_all(graph, target, excluded)
    return placements


def _is_unseen(placement: Placement, ranges: Ranges) -> bool:
    """Whether a branch computes tensors that it needs ranges of, and none has one."""
    own = {id(tensor) for node in placement.graph.nodes for tensor in node.outputs}
    names = [each.range_name for each in placement.activations.values() if id(each.source) in own]
    return bool(placement.branch and names) and not any(name in ranges.tensors for name in names)
