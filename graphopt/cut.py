"""What a removal of channels leaves for the passes after it: the graph before it, and which positions are kept.

Tensors keep their names when channels are removed, so a tensor of the cut graph and the one of the same name in the
original correspond; along each axis, `kept` says which positions of the original are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cut:
    """A removal of channels.

    Attributes:
        original: the graph before the cut.
        kept: by tensor name, weights too: per axis the kept positions, None where all are. A tensor that is not
            listed is whole.
    """

    original: gs.Graph
    kept: Mapping[str, tuple[NDArray[np.int64] | None, ...]]
