"""Figures of a learning step, added up over micro-batches and learners without waiting for any of them.

Owns: which figures there are and what each is divided by. Does not know how one is computed, or when it is read.
"""

from collections.abc import Mapping

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
    """Adds metrics up where they are computed, on the device, without waiting for them.

    Legend: M metrics, in the order of `METRICS`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for name, figure in figures.items():
            value = figure.to(torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def count(self, tokens: int, answers: int) -> None:
        """Trained tokens, and answers that have any."""
        counted = {"tokens": tokens, "answers": answers}
        self.add({name: torch.full((), n, dtype=torch.float64, device=self._device) for name, n in counted.items()})

    def over_learners(self, reduce: Reduce) -> Tensor:
        """Sums over all learners, (M,); one whose share was empty adds zeros."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        sums_M = torch.stack([self._sums.get(name, zero) for name in METRICS])
        reduce(sums_M)
        return sums_M
