"""How much the outputs move with each unit: first-order importance from differences of outputs, without labels.

Where a linear operator reads a unit's positions, they are multiplied by a gain g, which is 1. With y the outputs,

    score = mean over samples of |y(g = 1 - d) - y(1)|^2 / (d^2 |y(1)|^2)        d = 0.1

is the squared first-order term of what removing the unit (g = 0) does: that of Molchanov et al., "Importance Estimation
for Neural Network Pruning", arXiv:1906.10771, with outputs in place of a loss. It takes a run for each unit and sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.channel_groups import ChannelGroups
from graphopt.feeds import Samples
from graphopt.graph import Names, producer, set_input
from graphopt.model_io import Model
from graphopt.progress import Progress, silent, track
from graphopt.runtime import open_session

SAMPLES = 8
"""How many samples are used: one run for each of them and each unit is what it costs."""
_STEP = 0.1

Scores = NDArray[np.float64]
Outputs = Mapping[str, NDArray[np.generic]]


def sensitivities(model: Model, groups: ChannelGroups, samples: Samples, *, progress: Progress = silent) -> Scores:
    """The score of every unit that can go, float64 [groups.count]; 0 for the others.

    Args:
        model: what `groups` were found in; it is left as it is.
        groups: of its graph.
        samples: inputs; the first `SAMPLES` are used.
        progress: told after every unit.

    Raises:
        DataError: a sample does not fit the model.
    """
    copy = model.copy()
    gains = _add_gains(copy.graph, groups)
    session = open_session(copy)
    ones = {name: gain.ones for name, gain in gains.items()}
    feeds = [dict(feed) for _, feed in zip(range(SAMPLES), samples, strict=False)]
    plain = [session.run({**feed, **ones}) for feed in feeds]
    scores = np.zeros(groups.count)
    free = [int(unit) for group in groups.groups if group.frozen is None for unit in group.units]
    for unit in track(free, progress, "measure channels", len(free)):
        stepped = {name: gain.stepped(unit) for name, gain in gains.items()}
        moved = [session.run({**feed, **stepped}) for feed in feeds]
        scores[unit] = np.mean([_moved(before, after) for before, after in zip(plain, moved, strict=True)])
    return scores


class _Gain(NamedTuple):
    """One input of gains: at 1, in the shape in which it broadcasts, and the units of its positions."""

    ones: NDArray[np.generic]
    labels: NDArray[np.int64]  # [columns, positions]

    def stepped(self, unit: int) -> NDArray[np.generic]:
        """The gains with a step down at the positions of a unit."""
        at = (self.labels == unit).any(axis=0)
        return np.where(at, 1 - _STEP, 1.0).astype(self.ones.dtype).reshape(self.ones.shape)


def _add_gains(graph: gs.Graph, groups: ChannelGroups) -> dict[str, _Gain]:
    """Multiply what linear operators read by new inputs; return these by name."""
    names = Names(graph)
    readers = {node.outputs[0].name: node for node in graph.nodes if node.outputs}
    gained: dict[tuple[str, int], gs.Tensor] = {}
    found = {}
    for linear in groups.linears:
        axes, node = groups.axes.get(linear.data), readers.get(linear.output)
        labels = None if axes is None else axes[linear.data_axis]
        index = None if node is None else next((i for i, t in enumerate(node.inputs) if t.name == linear.data), None)
        if axes is None or labels is None or node is None or index is None:
            continue
        tensor, key = node.inputs[index], (linear.data, linear.data_axis)
        if key not in gained and producer(tensor) is not None and tensor.dtype is not None:
            shape = tuple(labels.shape[1] if axis == linear.data_axis else 1 for axis in range(len(axes)))
            gain = gs.Variable(names.fresh(f"{tensor.name}_gain"), tensor.dtype, shape)
            output = gs.Variable(names.fresh(f"{tensor.name}_gained"), tensor.dtype, tensor.shape)
            graph.inputs.append(gain)
            graph.nodes.append(gs.Node("Mul", output.name, {}, [tensor, gain], [output]))
            gained[key] = output
            found[gain.name] = _Gain(np.ones(shape, tensor.dtype), labels)
        if key in gained:
            set_input(node, index, gained[key])
    graph.toposort()
    return found


def _moved(before: Outputs, after: Outputs) -> float:
    total = 0.0
    for name, value in before.items():
        if value.dtype.kind == "f" and value.size:
            was, moved = value.astype(np.float64), after[name].astype(np.float64)
            total += float(((moved - was) ** 2).sum() / max((was**2).sum(), np.finfo(np.float64).tiny))
    return total / _STEP**2
