"""Where pairs go in a graph of which calibration has seen a part: operators that need other ranges stay float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_graphsurgeon as gs

from graphopt.errors import PipelineError
from graphopt.graph import constant_of
from graphopt.moved_integers import sources_of
from graphopt.nested_tensors import range_names
from graphopt.placement import Activation, Placement, place_all
from graphopt.ranges import Ranges
from graphopt.targets import Target

_UNSEEN = "no sample went through {} in calibration, so it has no ranges: calibrate on samples that do"


def place_calibrated(
    graph: gs.Graph, target: Target, excluded: dict[int, str], ranges: Ranges
) -> tuple[Placement, ...]:
    """The placements, as `place_all` has them, over tensors whose ranges are known.

    A tensor without a range that holds elements of one with a range has that one's: where the operator that computes
    the other stays float, so does what moves its values, and the pair stands behind that.

    Args:
        graph: as `place_all`.
        target: the table to follow.
        excluded: by id of a node, why it must stay float; gains the operators that need a range which is not known.
        ranges: what calibration found.

    Raises:
        PipelineError: no range fits the graph.
    """
    names = range_names(graph)
    placements = _placed(graph, target, excluded, ranges, names)
    wanted = [name for each in placements for name in each.observed]
    if wanted and ranges.tensors and not any(name in ranges.tensors for name in wanted):
        raise PipelineError(
            f"the ranges are of another model: none is called like this one's tensors ({wanted[0]}, ...)"
        )
    for placement in placements:
        if _is_unseen(placement, ranges):
            excluded |= {id(node): _UNSEEN.format(placement.label) for node in placement.nodes}
    while missing := [
        (placement.users[name], activation.range_name)
        for placement in placements
        for name, activation in placement.activations.items()
        if activation.range_name not in ranges.tensors
    ]:
        for users, name in missing:
            for node in users:
                excluded.setdefault(id(node), f"no range is known for {name}")
        placements = _placed(graph, target, excluded, ranges, names)
    return placements


def _placed(
    graph: gs.Graph, target: Target, excluded: Mapping[int, str], ranges: Ranges, names: Mapping[int, str]
) -> tuple[Placement, ...]:
    return tuple(
        replace(
            placement,
            activations={
                name: _with_known_range(found, ranges, names) for name, found in placement.activations.items()
            },
        )
        for placement in place_all(graph, target, excluded)
    )


def _with_known_range(activation: Activation, ranges: Ranges, names: Mapping[int, str]) -> Activation:
    """The activation with the range of the one tensor whose elements it holds, where it has none itself."""
    if activation.range_name in ranges.tensors:
        return activation
    sources = [(each, constant_of(each)) for each in sources_of(activation.source)]
    computed = [each for each, value in sources if value is None]
    if len(computed) != 1:
        return activation
    (source,) = computed
    name = names.get(id(source), source.name)
    found = ranges.tensors.get(name)
    if found is None or any(
        value is not None and value.size and not found.minimum <= value.min() <= value.max() <= found.maximum
        for _, value in sources
    ):
        return activation
    return replace(activation, source=source, range_name=name)


def _is_unseen(placement: Placement, ranges: Ranges) -> bool:
    """Whether a nested graph has tensors of its own that it needs ranges of, and none has one."""
    own = {id(tensor) for node in placement.graph.nodes for tensor in node.outputs}
    own |= {id(tensor) for tensor in placement.graph.inputs}
    names = [each.range_name for each in placement.activations.values() if id(each.source) in own]
    return bool(placement.label and names) and not any(name in ranges.tensors for name in names)
