"""The numeric guard, end to end: a bad number moves nothing, extreme ones are survived, edges train."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from learner_steps import (
    BATCH,
    finite,
    parameters,
    same_bits,
)
from rollcast_learners.batch import Batch, collate
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.settings import KLSettings
from rollcast_learners.types import Trajectory
from trajectories import answer

NAN, INF = float("nan"), float("inf")


# The numeric guard, end to end.


def replaced(batch: Batch, column: str, value: float, at: int = 1) -> Batch:
    values = getattr(batch, column).copy()
    values[at] = value
    return dataclasses.replace(batch, **{column: values})


def spoil_weight(learner: PolicyLearner, value: float) -> None:
    with torch.no_grad():
        learner.policy.lm.model.layers[1].mlp.up_proj.weight[3, 4] = value


def spoil_value(learner: PolicyLearner, value: float) -> None:
    with torch.no_grad():
        learner.policy.value_head.bias.fill_(value)


def spoil_gradient(learner: PolicyLearner, value: float) -> None:
    weight = learner.policy.lm.model.layers[0].self_attn.q_proj.weight
    weight.register_hook(lambda grad: grad.clone().index_fill_(0, torch.tensor([2]), value))


@pytest.mark.parametrize("budget", [25, 4096], ids=["parts", "whole"])
@pytest.mark.parametrize(
    "what, value",
    [
        ("rewards_N", NAN),  # An infinite one is clipped, an infinite log-ratio clamped: see below.
        ("old_logprobs_N", NAN),
        *[(spoil, value) for spoil in (spoil_weight, spoil_value, spoil_gradient) for value in (NAN, INF, -INF)],
    ],
)
def test_one_bad_number_and_nothing_moves(what, value, budget, build):
    learner, batch = build(microbatch_tokens=budget), collate(BATCH)
    learner.step(batch)
    if callable(what):
        what(learner, value)
    else:
        batch = replaced(batch, what, value)
    before, moments_before = parameters(learner), copy.deepcopy(learner.optimizer.adamw.state_dict()["state"])
    result = learner.step(batch)
    assert same_bits(before, parameters(learner))
    for name, state in learner.optimizer.adamw.state_dict()["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, moments_before[name][key])
    assert result.metrics["guard/skipped_steps"] == 1
    assert result.diverged is None
    assert all(math.isfinite(value) for value in result.metrics.values())


def test_after_a_skipped_step_the_next_is_as_if_it_had_not_been(build):
    learner, twin = build(), build()
    learner.step(replaced(collate(BATCH), "rewards_N", NAN))
    learner.step(collate(BATCH))
    twin.steps_done = 1
    twin.step(collate(BATCH))
    assert same_bits(parameters(learner), parameters(twin))


def test_only_the_minibatch_with_the_bad_number_is_skipped(build):
    learner = build(minibatches=4, normalize_advantages="none", critic="none")
    before = parameters(learner)
    result = learner.step(replaced(collate(BATCH), "rewards_N", NAN))
    assert result.metrics["guard/skipped_steps"] == 1
    assert finite(parameters(learner))
    assert not same_bits(before, parameters(learner))


@pytest.mark.parametrize("value", [INF, -INF, -1000.0, 1e30], ids=str)
@pytest.mark.parametrize("column", ["rewards_N", "old_logprobs_N"])
def test_extreme_numbers_are_clamped_and_counted(column, value, build):
    learner = build()
    metrics = learner.step(replaced(collate(BATCH), column, value)).metrics
    assert metrics["guard/skipped_steps"] == 0
    assert metrics["guard/clipped_rewards" if column == "rewards_N" else "guard/clamped_ratios"] >= 1
    assert finite(parameters(learner))


@pytest.mark.parametrize("settings", [{"value": 1e6}, {"value": 1e6, "value_clip": 0.2}], ids=["plain", "clipped"])
def test_a_critic_that_is_far_off_is_survived(settings, build):
    learner = build(**settings)
    learner.step(collate(BATCH))
    assert finite(parameters(learner))


@pytest.mark.parametrize("applied_as", ["reward", "loss"])
def test_a_huge_kl_is_survived(applied_as, build):
    learner = build("head", KLSettings(kind="k3", coef=1000.0, applied_as=applied_as))
    learner.step(collate(BATCH))
    assert finite(parameters(learner))


def one_much_longer() -> list[Trajectory]:
    return [answer([1], [2, 3], 1.0), answer([1], list(range(200)), 0.5, number=1)]


EDGES = {
    "one episode": [answer([1, 2], [3, 4], 1.0)],
    "one token": [answer([1, 2], [3], 1.0)],
    "one-token answers": [answer([1, 2], [n], float(n % 2), number=n) for n in range(6)],
    "equal rewards": [answer([1, 2], [n, 5], 0.3, number=n) for n in range(6)],
    "rewards of zero": [answer([1, 2], [n, 5], 0.0, number=n) for n in range(6)],
    "all truncated": [answer([1, 2], [n, 5], float(n), truncated=True, number=n) for n in range(6)],
    "all cut off": [answer([1, 2], [n, 5], float(n), finish="length", number=n) for n in range(6)],
    "one 100 times longer": one_much_longer(),
}


@pytest.mark.parametrize("on_length", ["zero", "bootstrap", "mask"])
@pytest.mark.parametrize("critic, normalize", [("head", "batch"), ("none", "group"), ("none", "batch")])
@pytest.mark.parametrize("name", EDGES)
def test_edges_train_without_an_undefined_number(name, critic, normalize, on_length, build):
    learner = build(critic, normalize_advantages=normalize)
    result = learner.step(collate(EDGES[name], on_length))
    assert result.diverged is None
    assert result.metrics["guard/skipped_steps"] == 0
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert finite(parameters(learner))


@pytest.mark.parametrize("critic, normalize", [("none", "batch"), ("none", "group"), ("head", "group")])
def test_equal_rewards_teach_the_policy_nothing(critic, normalize, build):
    learner = build(critic, normalize_advantages=normalize, value_coef=0.0)
    before = parameters(learner)
    metrics = learner.step(collate(EDGES["equal rewards"])).metrics
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-7)
    assert all(torch.equal(before[n], p) for n, p in parameters(learner).items() if n.startswith("lm."))


def test_explained_variance_is_absent_where_returns_do_not_vary(build):
    assert "explained_variance" not in build().step(collate(EDGES["equal rewards"])).metrics
    assert "explained_variance" not in build("none").step(collate(BATCH)).metrics
    assert "explained_variance" in build().step(collate(BATCH)).metrics


@pytest.mark.parametrize("minibatches", [1, 2])
def test_nothing_to_train_on_moves_nothing(minibatches, build):
    """All masked, or an empty share: momentum of earlier steps does not move the policy either."""
    learner = build(minibatches=minibatches)
    learner.step(collate(BATCH))
    before = parameters(learner)
    masked = learner.step(collate(EDGES["all cut off"], "mask"))
    empty = learner.step(collate(BATCH).select(np.array([], np.intp)))
    assert same_bits(before, parameters(learner))
    assert masked.metrics["guard/skipped_steps"] == empty.metrics["guard/skipped_steps"] == 0
    assert learner.steps_done == 3


def test_three_skips_halve_the_rate_and_ten_are_divergence(build):
    learner, bad = build(learning_rate=1e-4), replaced(collate(BATCH), "rewards_N", NAN)
    before = parameters(learner)
    results = [learner.step(bad) for _ in range(10)]
    assert results[3].metrics["learning_rate"] == pytest.approx(0.5e-4)
    assert [r.diverged for r in results[:9]] == [None] * 9
    assert "skipped" in results[9].diverged
    assert results[9].metrics["guard/skipped_steps"] == 10
    assert same_bits(before, parameters(learner))


def test_a_step_stops_when_the_samples_no_longer_fit(build):
    """Behaviour KL beyond 10 nats: the remaining epochs are not trained."""
    learner = build(epochs=5)
    far = [answer([1, 2], [n, 5], float(n), number=n, logprobs=[-60.0, -60.0]) for n in range(4)]
    learner.step(collate(far))
    assert {int(s["step"]) for s in learner.optimizer.adamw.state.values()} == {1}
