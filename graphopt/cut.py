"""What a removal of channels did to a graph: the graph before it, and the positions that each tensor kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cut:
    """A graph before channels were removed, and what is left of each tensor.

    Attributes:
        original: the graph before the cut.
        kept: by tensor name, weights too, for each axis the positions of the original that the cut graph still has, in
            order; None: all. A tensor that is not listed is whole.
    """

    original: gs.Graph
    kept: Mapping[str, tuple[NDArray[np.int64] | None, ...]]
