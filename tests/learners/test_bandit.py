"""Every algorithm solves a small text task: from a reward of at most 0.3 to at least 0.9, in seconds."""

import copy
from collections.abc import Callable

import pytest

from bandit import solve
from rollcast_learners.algorithms import ALGORITHMS, AlgorithmName
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings


@pytest.fixture(scope="module")
def policies(tiny_fp32: str) -> Callable[[str], Policy]:
    loaded = {critic: Policy(PolicySettings(tiny_fp32, "float32", critic)) for critic in ("head", "separate", "none")}
    return lambda critic: copy.deepcopy(loaded[critic])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_solves_it(name: AlgorithmName, policies) -> None:
    settings = LearnerSettings(algorithm=name, learning_rate=3e-3, value_learning_rate=1e-2)
    kl = KLSettings(kind="k1", coef=0.03) if name == "soft_q" else None
    before, after = solve(policies(settings.critic), settings, kl)
    assert before <= 0.3 and after >= 0.9


def test_a_separate_critic_solves_it_too(policies) -> None:
    settings = LearnerSettings(critic="separate", learning_rate=3e-3, value_learning_rate=3e-3)
    before, after = solve(policies("separate"), settings)
    assert before <= 0.3 and after >= 0.9


@pytest.mark.parametrize("correction", ["decoupled", "token_tis", "sequence_tis", "token_mask", "sequence_mask"])
def test_old_samples_are_learned_from_with_every_correction(correction: str, policies) -> None:
    settings = LearnerSettings(algorithm="reinforce", learning_rate=2e-3)
    before, after = solve(policies("none"), settings, None, CorrectionSettings(correction=correction), staleness=2)
    assert before <= 0.3 and after >= 0.9
