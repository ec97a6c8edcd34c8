"""What old samples cost: PPO four versions behind, with a correction and without, against PPO on fresh samples.

`pytest tests/learners/test_staleness.py -s` prints every seed.
"""

import copy

import numpy as np
import pytest

from bandit import solve
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import CorrectionSettings, LearnerSettings

SEEDS = range(5)
STEPS = 40
SETTINGS = LearnerSettings(algorithm="ppo", learning_rate=2e-3, value_learning_rate=1e-2)
"""A step size at which forty steps are not enough: who learns slower is seen."""


@pytest.fixture(scope="module")
def base(tiny_fp32: str) -> Policy:
    return Policy(PolicySettings(tiny_fp32, "float32", "head"))


def rewards(base: Policy, correction: str, staleness: int) -> np.ndarray:
    """The reward after STEPS, seed by seed."""
    corrected = CorrectionSettings(correction=correction)  # type: ignore[arg-type]
    runs = {"staleness": staleness, "steps": STEPS, "enough": 2.0}
    found = np.array([solve(copy.deepcopy(base), SETTINGS, None, corrected, seed=s, **runs)[1] for s in SEEDS])
    print(f"staleness {staleness}, {correction}: {np.round(found, 3)} mean {found.mean():.3f}")
    return found


@pytest.fixture(scope="module")
def fresh(base: Policy) -> np.ndarray:
    return rewards(base, "none", 0)


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean of `one` minus `other`, and its standard error."""
    variances = [values.var(ddof=1) / len(values) for values in (one, other)]
    return float(one.mean() - other.mean()), float(np.sqrt(sum(variances)))


@pytest.mark.parametrize("correction", ["decoupled", "token_tis"])
def test_corrected_old_samples_are_not_worse_than_fresh_ones(correction: str, base: Policy, fresh: np.ndarray) -> None:
    worse, error = difference(rewards(base, correction, 4), fresh)
    assert worse > -2 * error


def test_without_a_correction_old_samples_teach_less(base: Policy, fresh: np.ndarray) -> None:
    naive = rewards(base, "none", 4)
    worse, error = difference(naive, fresh)
    assert worse < -2 * error
