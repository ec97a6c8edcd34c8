"""Batches for a group of learners, and what it answered, held to what another did.

Owns: what the tests of `Learners` share. Runs in the test's own process: learner processes cannot import it.
"""

from pathlib import Path

import pytest
import torch

from rollcast_learners.arena import open_tensors
from rollcast_learners.batch import Batch, collate
from rollcast_learners.learner import StepResult
from rollcast_learners.rllib import Learners
from rollcast_learners.types import Weights
from trajectories import random_episodes


def batch_of(seed: int, groups: int = 5) -> Batch:
    return collate(random_episodes(seed, groups=groups, samples=3), "bootstrap")


def one_group(seed: int) -> Batch:
    """Of two learners, one gets nothing."""
    return batch_of(seed, groups=1)


def published(learners: Learners, folder: Path, version: int) -> dict[str, torch.Tensor]:
    segments, manifest = learners.publish(version, str(folder), [])
    weights = Weights("full", version, manifest, segments, "here", str(folder))
    return {name: tensor.clone() for name, tensor in open_tensors(weights, folder).items()}


def assert_equal(result: StepResult, other: StepResult) -> None:
    assert result.diverged == other.diverged
    assert result.metrics.keys() == other.metrics.keys()
    for name, value in other.metrics.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
