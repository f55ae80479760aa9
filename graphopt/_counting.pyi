from typing import Any

import numpy as np
from numpy.typing import NDArray

def count(values: NDArray[Any], per_width: float, counts: NDArray[np.int64], /) -> None: ...
