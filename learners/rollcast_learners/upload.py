"""Columns of the host on the learner's device.

Owns: that copy. Does not know what a column means.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor


def upload(column: NDArray[Any], device: torch.device, dtype: DTypeLike | None = None) -> Tensor:
    """A copy on the device, as `dtype` where one is given. Made from pinned memory, so that the host does not wait for
    whatever the device is still at."""
    tensor = torch.from_numpy(np.array(column, dtype))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
