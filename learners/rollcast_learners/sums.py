"""Figures of a learning step, added up over micro-batches and learners without waiting for any of them.

Owns: which figures there are and what each is divided by. Does not know how one is computed.
"""

from collections import defaultdict

import torch
from torch import Tensor

from rollcast_learners.optimizer import Reduce

LOSS_MEANS = ("loss/policy", "loss/value", "loss/supervised")
"""Sums of weighted terms: divided by what the loss is a mean over, tokens or answers."""
TOKEN_MEANS = (
    "loss/entropy",
    "kl/behaviour",
    "kl/reference",
    "clip_fraction",
    "value_clip_fraction",
    "soft_value",
)
METRICS = ("loss", "tokens", "answers", "clamped", *LOSS_MEANS, *TOKEN_MEANS)
"""The same on every learner, whatever its share held."""


class StepSums:
    """Adds metrics up: tensors without waiting for them, then one transfer and one all-reduce."""

    def __init__(self) -> None:
        self.values: dict[str, float] = defaultdict(float)
        self._tensors: dict[str, Tensor] = {}

    def add_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            value = tensor.to(torch.float64)
            self._tensors[name] = self._tensors[name] + value if name in self._tensors else value

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values[name] += value

    def total(self, reduce: Reduce) -> dict[str, float]:
        """Sums over all learners; one whose share was empty adds zeros."""
        zero = torch.zeros((), dtype=torch.float64)
        stacked = torch.stack([self._tensors.get(name, zero).cpu() for name in METRICS])
        reduce(stacked)
        return dict(zip(METRICS, stacked.tolist(), strict=True))
