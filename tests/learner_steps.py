"""A learner's step looked at: its parameters, its gradient, and whether two steps were the same.

Owns: the comparisons, and one batch for them. Does not know how a learner is made (learners/conftest.py).
"""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rollcast_learners.learner import PolicyLearner
from trajectories import random_episodes

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NO_CLIP = 1e9
"""A grad_clip that lets gradients be compared as they are."""


def parameters(learner: PolicyLearner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.policy.named_parameters()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8)) for n in left)


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors.values())


def assert_same_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To 1e-5 of the largest entry of each tensor: most entries are smaller than 1e-5 themselves."""
    for name, grad in theirs.items():
        largest = max(grad.abs().max().item(), 1e-6)
        assert_close(ours[name], grad, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"gradient of {n}: {m}")


def gradient(learner: PolicyLearner) -> dict[str, Tensor]:
    """What the last optimiser step was made from."""
    return {n: g.clone() for n, g in zip(learner.optimizer.names, learner.optimizer.grads, strict=True)}


def check_same_step(
    one: PolicyLearner, other: PolicyLearner, metrics: dict[str, float], more: dict[str, float]
) -> None:
    assert metrics.keys() == more.keys()
    for name in metrics:
        assert metrics[name] == pytest.approx(more[name], rel=1e-5, abs=1e-5), name
    assert_same_gradient(gradient(other), gradient(one))
    for name, p in parameters(one).items():
        assert_close(parameters(other)[name], p, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


# Packing, micro-batches, order.

BATCH = random_episodes(21, groups=4, samples=4)
FULL = {"value": 0.1, "entropy_coef": 0.01, "value_clip": 0.2, "grad_clip": NO_CLIP}
