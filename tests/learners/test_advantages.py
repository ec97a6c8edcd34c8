"""GAE against RLlib's on 1,000 random sequences; group advantages against TRL's trainers, and against numpy."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollcast_learners.advantages import (
    centre,
    gae,
    gae_of_episodes,
    group_advantages,
    leave_one_out,
    moments,
    whiten,
)

Floats = st.lists(st.floats(-1e4, 1e4, width=32), min_size=0, max_size=40)


@pytest.fixture(scope="module")
def compute_value_targets() -> Callable[..., Any]:
    # Imported here: rllib takes ten seconds, which only the test that compares with it should pay.
    from ray.rllib.utils.postprocessing.value_predictions import compute_value_targets

    return compute_value_targets


def test_gae_equals_rllib_on_1000_random_sequences(compute_value_targets):
    random = np.random.default_rng(0)
    for case in range(1000):
        tokens = int(random.integers(1, 65))
        rewards, values = random.normal(size=tokens), random.normal(size=tokens)
        gamma, lam = random.uniform(0.5, 1.0, size=2)
        truncated = bool(case % 2)
        bootstrap = float(random.normal()) if truncated else 0.0
        # RLlib wants one step more: its value is the bootstrap after a truncation, gated away after an end.
        ends, cuts = np.zeros((2, tokens + 1))
        (cuts if truncated else ends)[tokens - 1] = 1.0
        theirs = compute_value_targets(np.append(values, bootstrap), np.append(rewards, 0.0), ends, cuts, gamma, lam)[
            :tokens
        ]
        advantages, returns = gae(torch.from_numpy(rewards), torch.from_numpy(values), bootstrap, gamma, lam)
        np.testing.assert_allclose(returns, theirs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(advantages, theirs - values, rtol=1e-5, atol=1e-5)


def backwards(rewards: list[float], values: list[float], bootstrap: float, gamma: float, lam: float) -> list[float]:
    """GAE as the paper's recursion: one token after the other, from the end."""
    advantages, later, value_after = [], 0.0, bootstrap
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        later = reward + gamma * value_after - value + gamma * lam * later
        value_after = value
        advantages.append(later)
    return advantages[::-1]


@pytest.mark.parametrize("lengths", [[5, 1, 0, 33, 2, 64], [1], [0, 0], [], [200, 1, 1, 7]])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.97, 0.9), (0.0, 1.0)])
def test_gae_of_episodes_is_the_recursion_of_each(lengths, gamma, lam):
    random = torch.Generator().manual_seed(len(lengths))
    rewards, values = torch.randn(2, sum(lengths), generator=random, dtype=torch.float64)
    bootstraps = torch.randn(len(lengths), generator=random)
    advantages, returns = gae_of_episodes(
        rewards, values, bootstraps, torch.tensor(lengths, dtype=torch.int64), gamma, lam
    )
    parts = zip(rewards.split(lengths), values.split(lengths), bootstraps.tolist(), strict=True) if lengths else ()
    expected = [a for r, v, b in parts for a in backwards(r.tolist(), v.tolist(), b, gamma, lam)]
    np.testing.assert_allclose(advantages, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(returns, advantages + values)


def test_a_nan_stays_in_its_episode():
    rewards = torch.tensor([0.0, 1.0, float("nan"), 1.0, 1.0])
    advantages, _ = gae_of_episodes(rewards, torch.zeros(5), torch.zeros(3), torch.tensor([2, 2, 1]), 1.0, 1.0)
    assert advantages.isnan().tolist() == [False, False, True, False, False]


def test_masked_values_have_no_part_in_moments():
    values, mask = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True])
    assert moments(values, mask).tolist() == moments(values[mask]).tolist() == [2.0, 4.0, 10.0]


def test_groups_that_are_numbered_already_give_the_same():
    returns, groups = torch.randn(12), torch.tensor([7, 7, 3, 3, 3, 9, 9, 9, 9, 7, 3, 5])
    _, numbered = groups.unique(return_inverse=True)
    for scale in (True, False):
        expected = group_advantages(returns, groups, scale=scale)
        assert torch.equal(group_advantages(returns, numbered, scale=scale, groups=4), expected)
    assert torch.equal(leave_one_out(returns, numbered, groups=4), leave_one_out(returns, groups))


def test_gae_of_three_tokens_by_hand():
    advantages, returns = gae(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.5]), 0.0, 1.0, 1.0)
    assert advantages.tolist() == [0.5, 0.5, 0.5]
    assert returns.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gae_keeps_dtype_shape_and_graph_apart(dtype):
    values = torch.randn(7, dtype=dtype, requires_grad=True)
    for result in gae(torch.randn(7, dtype=dtype), values, 0.3, 0.99, 0.95):
        assert result.dtype == dtype and result.shape == (7,) and not result.requires_grad


@pytest.mark.parametrize("tokens", [0, 1])
def test_gae_of_very_short_sequences(tokens):
    advantages, returns = gae(torch.ones(tokens), torch.zeros(tokens), 2.0, 0.5, 0.9)
    assert advantages.tolist() == returns.tolist() == [2.0] * tokens


def test_gae_carries_a_nan_to_earlier_tokens_only():
    rewards = torch.tensor([0.0, float("nan"), 1.0])
    advantages, _ = gae(rewards, torch.zeros(3), 0.0, 1.0, 0.5)
    assert advantages.isnan().tolist() == [True, True, False]


def test_gae_of_outliers_is_finite():
    advantages, returns = gae(torch.tensor([0.0, 1e6]), torch.tensor([1e6, -1e6]), 0.0, 1.0, 1.0)
    assert advantages.isfinite().all() and returns.tolist() == [1e6, 1e6]


def test_gae_is_linear_in_time():
    rewards, values = torch.randn(4096), torch.randn(4096)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        gae(rewards, values, 0.0, 1.0, 0.95)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02  # 1.2 ms on an idle core; the slack is for busy machines


@pytest.mark.parametrize(
    "rewards, values, message",
    [
        (torch.zeros(2), torch.zeros(3), r"\(2,\).*\(3,\).*one length"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "1-D"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "floating-point"),
    ],
)
def test_gae_refuses_what_it_cannot_read(rewards, values, message):
    with pytest.raises(ValueError, match=message):
        gae(rewards, values, 0.0, 1.0, 1.0)


def test_whiten_gives_mean_zero_and_deviation_one():
    whitened = whiten(torch.randn(500) * 3 + 100)
    assert abs(float(whitened.mean())) < 1e-5
    assert abs(float(whitened.std(correction=0)) - 1) < 1e-5


@pytest.mark.parametrize("values", [[], [3.0], [0.1] * 7, [-1e6] * 5, [0.0, 0.0]])
def test_whiten_of_no_spread_is_zeros(values):
    assert whiten(torch.tensor(values)).tolist() == [0.0] * len(values)


def test_whiten_shows_a_nan():
    assert whiten(torch.tensor([1.0, float("nan"), 2.0])).isnan().all()
    assert whiten(torch.tensor([1.0, float("inf"), 2.0])).isnan().all()


@settings(max_examples=100, deadline=None)
@given(Floats, st.integers(0, 40))
def test_whitening_on_two_learners_equals_one(values, cut):
    advantages = torch.tensor(values, dtype=torch.float32)
    parts = advantages[:cut], advantages[cut:]
    added = moments(parts[0]) + moments(parts[1])
    apart = torch.cat([whiten(part, added) for part in parts])
    torch.testing.assert_close(apart, whiten(advantages), rtol=1e-5, atol=1e-5)
    assert apart.isfinite().all() and apart.dtype == torch.float32


def test_group_advantages_equal_numpy():
    random = np.random.default_rng(1)
    for _ in range(100):
        samples = int(random.integers(1, 40))
        returns, groups = random.normal(size=samples), random.integers(-3, 4, size=samples)
        expected = np.zeros(samples)
        for group in np.unique(groups):
            members = returns[groups == group]
            if len(members) > 1:
                expected[groups == group] = (members - members.mean()) / (members.std() + 1e-8)
        ours = group_advantages(torch.from_numpy(returns), torch.from_numpy(groups))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_group_advantages_without_spread_are_zeros():
    returns, groups = torch.tensor([0.7, 0.7, 0.7, 5.0, 1.0, 0.0]), torch.tensor([9, 9, 9, 4, 2, 2])
    torch.testing.assert_close(group_advantages(returns, groups), torch.tensor([0.0, 0, 0, 0, 1, -1]))
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_a_nan_spoils_its_own_group_only():
    returns = torch.tensor([float("nan"), 1.0, 1.0, 0.0])
    advantages = group_advantages(returns, torch.tensor([0, 0, 1, 1]))
    assert advantages.isnan().tolist() == [True, True, False, False]


def test_group_advantages_refuse_unequal_lengths():
    with pytest.raises(ValueError, match="group_B has shape"):
        group_advantages(torch.zeros(3), torch.zeros(2))


def test_leave_one_out_is_the_mean_of_the_others():
    random = np.random.default_rng(5)
    for _ in range(200):
        groups = np.repeat(np.arange(4), random.integers(1, 5, size=4))
        order = random.permutation(len(groups))
        groups, returns = groups[order], random.normal(size=len(order))
        expected = [
            np.mean([r for j, r in enumerate(returns) if groups[j] == g and j != i])
            if (groups == g).sum() > 1
            else returns[i]
            for i, g in enumerate(groups)
        ]
        baseline = leave_one_out(torch.from_numpy(returns), torch.from_numpy(groups))
        np.testing.assert_allclose(baseline, expected, rtol=1e-9, atol=1e-9)


def test_centre_and_unscaled_groups_keep_the_spread():
    returns, groups = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    assert centre(returns).tolist() == [-6.0, -4.0, 3.0, 7.0]
    assert centre(returns[:2], moments(returns)).tolist() == [-6.0, -4.0]
    assert group_advantages(returns, groups, scale=False).tolist() == [-1.0, 1.0, -2.0, 2.0]
    assert centre(torch.zeros(0)).shape == (0,)


# ---- TRL's own (trl_advantages.py asked its trainers)


@pytest.fixture(scope="module")
def trl() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("trl_advantages.json").read_text(encoding="utf-8"))


def columns(steps: list[dict[str, list[float]]], samples: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    groups = torch.arange(len(steps[0]["rewards"])) // samples
    # TRL holds rewards in float32.
    return [
        (torch.tensor(s["rewards"]).double(), groups, torch.tensor(s["advantages"], dtype=torch.float64)) for s in steps
    ]


def test_centred_groups_equal_trl(trl):
    for rewards, groups, theirs in columns(trl["grpo_unscaled"], trl["samples"]):
        torch.testing.assert_close(group_advantages(rewards, groups, scale=False), theirs, rtol=1e-5, atol=5e-5)


def test_leave_one_out_equals_trl(trl):
    for rewards, groups, theirs in columns(trl["rloo"], trl["samples"]):
        torch.testing.assert_close(rewards - leave_one_out(rewards, groups), theirs, rtol=1e-5, atol=5e-5)


def test_scaled_groups_equal_trl_but_for_its_divisor(trl):
    """TRL divides by the deviation over count - 1, plus 1e-4; we by the population's. Theirs follows from ours."""
    count = trl["samples"]
    for rewards, groups, theirs in columns(trl["grpo"], count):
        ours = group_advantages(rewards, groups)
        deviation = rewards.view(-1, count).std(1, correction=0).repeat_interleave(count)
        same = ours * deviation / (deviation * (count / (count - 1)) ** 0.5 + 1e-4)
        torch.testing.assert_close(same, theirs, rtol=1e-5, atol=1e-4)
