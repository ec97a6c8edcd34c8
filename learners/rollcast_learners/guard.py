"""What keeps bad numbers out of the policy: which samples may train, and which optimiser steps may happen.

Owns: the rules and their counters. Does not know models, optimisers or other learners: the caller first
agrees with the other ranks on `finite` and the global gradient norm, so that every rank's guard sees the same
and says the same; and the caller does what the verdict says.

Legend for shapes: B sequences, T packed tokens.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

SPIKE_FACTOR = 100.0
"""A gradient norm above this multiple of the running median is a spike."""
NORM_HISTORY = 50
"""The median runs over this many norms of steps that were taken ..."""
MINIMUM_HISTORY = 8
"""... and is not trusted before there are this many."""
NORM_FLOOR = 1e-8
"""Norms up to this (nothing to learn, as when all rewards are equal) teach the median nothing: a median of
zero would call the next real gradient a spike."""
HALVE_AFTER = 3
"""Skips in a row until the learning rate is to be halved."""
STOP_AFTER = 10
STOP_WINDOW = 100
"""So many skips in so many steps are divergence."""


class Diverged(Exception):
    """Too many optimiser steps were unusable; training on is a waste. The run exits with code 3."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Verdict(StrEnum):
    """What to do with one optimiser step."""

    STEP = "step"
    SKIP = "skip"
    SKIP_AND_HALVE = "skip and halve the learning rate"


class NumericGuard:
    """Decides, step by step, whether a gradient is fit to be applied.

    `guard.decide(finite, grad_norm)` is STEP, SKIP, or (once per streak of skips, at its third)
    SKIP_AND_HALVE; the tenth skip among the last hundred steps raises `Diverged`. `skipped` counts all skips
    of the run.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._streak = 0
        self._norms: deque[float] = deque(maxlen=NORM_HISTORY)
        self._recent: deque[bool] = deque(maxlen=STOP_WINDOW)

    def decide(self, finite: bool, grad_norm: float) -> Verdict:
        """`finite` covers the loss, on all ranks; `grad_norm` is the global norm before clipping."""
        problem = self._problem(finite, grad_norm)
        self._recent.append(problem is not None)
        if problem is None:
            return self._accept(grad_norm)
        return self._skip(problem)

    def state(self) -> dict[str, Any]:
        """Everything the next decision depends on, as JSON."""
        return {
            "skipped": self.skipped,
            "streak": self._streak,
            "norms": list(self._norms),
            "recent": list(self._recent),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        expected = self.state().keys()
        if state.keys() != expected:
            raise ValueError(
                f"guard state has the keys {sorted(state)}; expected {sorted(expected)}: "
                "load what NumericGuard.state() returned"
            )
        self.skipped = int(state["skipped"])
        self._streak = int(state["streak"])
        self._norms = deque(state["norms"], maxlen=NORM_HISTORY)
        self._recent = deque(state["recent"], maxlen=STOP_WINDOW)

    def _problem(self, finite: bool, grad_norm: float) -> str | None:
        if not finite:
            return "a loss was not finite"
        if not math.isfinite(grad_norm):
            return f"the gradient norm was {grad_norm}"
        if len(self._norms) < MINIMUM_HISTORY:
            return None
        median = statistics.median(self._norms)
        if grad_norm > SPIKE_FACTOR * median:
            return f"the gradient norm was {grad_norm:.3g}, over {SPIKE_FACTOR:g} x its median {median:.3g}"
        return None

    def _accept(self, grad_norm: float) -> Verdict:
        self._streak = 0
        if grad_norm > NORM_FLOOR:
            self._norms.append(grad_norm)
        return Verdict.STEP

    def _skip(self, problem: str) -> Verdict:
        self.skipped += 1
        self._streak += 1
        skips = sum(self._recent)
        if skips >= STOP_AFTER:
            raise Diverged(
                f"{skips} of the last {len(self._recent)} optimiser steps were skipped; expected fewer than "
                f"{STOP_AFTER}. At the last one {problem}. Lower learner.learning_rate or learner.grad_clip, "
                "or look at the batch that was saved"
            )
        return Verdict.SKIP_AND_HALVE if self._streak == HALVE_AFTER else Verdict.SKIP


def finite_sequences(lengths_B: Tensor, *columns_T: Tensor) -> Tensor:
    """Which packed sequences may train: True where every one of its tokens is finite in every column.

    `finite_sequences(lengths_B, logprobs_T, values_T) & rewards_B.isfinite()`. Without tokens: True.
    """
    tokens = int(lengths_B.sum())
    finite_T = torch.ones(tokens, dtype=torch.bool, device=lengths_B.device)
    for column_T in columns_T:
        if column_T.shape != finite_T.shape:
            raise ValueError(
                f"a column has shape {tuple(column_T.shape)}; expected ({tokens},), the sum of lengths_B: "
                "pass packed columns without padding"
            )
        finite_T = finite_T & column_T.isfinite()
    ends_B = lengths_B.cumsum(0)
    counts_T = torch.cat([ends_B.new_zeros(1), finite_T.cumsum(0)])
    return counts_T[ends_B] - counts_T[ends_B - lengths_B] == lengths_B


def clip_rewards(values: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Rewards held within +-`limit`, and how many were beyond it (0-d). NaN stays NaN: drop those samples."""
    if not limit > 0:
        raise ValueError(f"reward limit is {limit}; expected a number above 0: set learner.reward_clip")
    return values.clamp(-limit, limit), (values.abs() > limit).sum()
