"""The learning step: rewards, values, KL and rates are wired right, and it learns."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from learner_steps import (
    BATCH,
    CLOSE,
    FULL,
    NO_CLIP,
    assert_same_gradient,
    gradient,
    parameters,
    same_bits,
)
from rollcast_learners import attention
from rollcast_learners.advantages import whiten
from rollcast_learners.batch import collate
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.losses import kl
from rollcast_learners.optimizer import rate_factor
from rollcast_learners.policy import Policy
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from rollcast_learners.types import Trajectory
from trajectories import answer, episode

# Rewards, values, advantages.


def by_hand(rewards: list[float], values: list[float], bootstrap: float, gamma: float, lam: float) -> list[float]:
    """GAE by its definition: for each token the sum over all later ones."""
    deltas = [r + gamma * v_next - v for r, (v, v_next) in zip(rewards, pairwise([*values, bootstrap]), strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize("budget", [20, 4096])
def test_advantages_are_those_of_the_definition(budget, build):
    """Over turns and streams; the environment's truncation goes on with the critic, termination with 0."""
    learner = build(value=0.5, normalize_advantages="none", gamma=0.97, lam=0.9, microbatch_tokens=budget)
    trajectories = [
        episode([[([1], False), ([2, 3], True), ([4], False), ([5], True)]], [1.0, -0.5]),
        episode([[([1], False), ([2], True)], [([6, 7], False), ([8, 9], True)]], [0.25, 2.0], number=1),
        answer([1], [2, 3, 4], 1.0, truncated=True, number=2),
        answer([5, 1], [3], 1.0, group="1"),
    ]
    rewards = [[0, 1.0, -0.5], [0.25, 0, 2.0], [0, 0, 1.0], [1.0]]
    batch = collate(trajectories)
    scored = learner._score(batch, torch.from_numpy(batch.rewards_N))
    with torch.no_grad():
        values_N, bootstrap_E = learner.policy.score_values(batch)
    assert bootstrap_E[2] != 0
    assert bootstrap_E[[0, 1, 3]].abs().max() == 0
    expected = [
        by_hand(r, v.tolist(), b, 0.97, 0.9)
        for r, v, b in zip(rewards, values_N.split(batch.episode_length_E.tolist()), bootstrap_E.tolist(), strict=True)
    ]
    assert_close(scored.advantages_N, torch.tensor([a for part in expected for a in part]), **CLOSE)
    assert_close(scored.returns_N, scored.advantages_N + values_N, **CLOSE)
    assert_close(scored.values_N, values_N, **CLOSE)


def test_batch_normalisation_whitens_what_is_trained(build):
    learner = build(value=0.5)
    batch = collate(BATCH, "mask")
    mask = torch.from_numpy(batch.loss_mask_N)
    assert not mask.all()
    scored = learner._score(batch, torch.from_numpy(batch.rewards_N))
    assert_close(scored.advantages_N[mask].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(scored.advantages_N[mask].std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_without_a_critic_group_normalisation_is_grpo(build):
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(3, 4)).round(3)
    batch = collate(
        [
            answer([g], rng.integers(0, 9, rng.integers(1, 9)).tolist(), rewards[g, n], group=str(g), number=n)
            for g in range(3)
            for n in range(4)
        ]
    )
    learner = build(critic="none", normalize_advantages="group")
    scored = learner._score(batch, torch.from_numpy(batch.rewards_N))
    grpo = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    expected = np.repeat(grpo.ravel(), batch.episode_length_E)
    assert_close(scored.advantages_N, torch.from_numpy(expected).float(), **CLOSE)


def test_rewards_are_clipped_and_counted(build):
    trajectories = [answer([1], [2, 3], 1e6), answer([1], [4], -3.0, number=1), answer([1], [5], 1.0, number=2)]
    wild, held = build(reward_clip=2.0), build()
    metrics = wild.step(collate(trajectories)).metrics
    assert metrics["guard/clipped_rewards"] == 2
    tame = [answer([1], [2, 3], 2.0), answer([1], [4], -2.0, number=1), answer([1], [5], 1.0, number=2)]
    assert held.step(collate(tame)).metrics["loss/value"] == metrics["loss/value"]
    assert same_bits(parameters(wild), parameters(held))


def test_the_first_step_has_the_gradient_of_the_formula(build):
    """Written out with autograd over the policy's outputs, in one expression."""
    learner = build(value=0.1, entropy_coef=0.05, value_coef=0.3, grad_clip=NO_CLIP)
    batch = collate(BATCH)
    twin = copy.deepcopy(learner.policy)
    outputs = twin(batch)
    scored = learner._score(batch, torch.from_numpy(batch.rewards_N))
    ratio = (outputs.logprobs_N - torch.from_numpy(batch.old_logprobs_N)).exp()
    advantages = whiten(scored.returns_N - scored.values_N)
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
    value = 0.5 * (outputs.values_N - scored.returns_N).square().mean()
    (policy + 0.3 * value - 0.05 * outputs.entropy_N.mean()).backward()
    metrics = learner.step(batch).metrics
    assert_same_gradient(gradient(learner), {name: p.grad for name, p in twin.named_parameters()})
    assert metrics["loss/policy"] == pytest.approx(policy.item(), abs=1e-5)
    assert metrics["loss/value"] == pytest.approx(value.item(), abs=1e-5)
    assert metrics["loss/entropy"] == pytest.approx(outputs.entropy_N.mean().item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(
        math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters())), rel=1e-4
    )
    variance = scored.returns_N.var(correction=0)
    left = (scored.returns_N - scored.values_N).var(correction=0)
    assert metrics["explained_variance"] == pytest.approx(1 - (left / variance).item(), abs=1e-5)


def test_masked_answers_train_nothing(build):
    """on_length = mask: as if the answer that was cut off had not been played."""
    cut = answer([9, 9], [8, 7], 5.0, group="9", finish="length")
    with_cut, without = build(**FULL), build(**FULL)
    with_cut.step(collate([*BATCH[:4], cut], "mask"))
    without.step(collate(BATCH[:4], "mask"))
    assert_same_gradient(gradient(with_cut), gradient(without))


# KL, critic warm-up, learning rates.


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_as_a_loss(kind, build):
    """With rewards of 0 the KL is all there is."""
    learner = build("none", KLSettings(kind=kind, coef=0.7, applied_as="loss"), grad_clip=NO_CLIP)
    batch = collate([answer([1, 2], [3, 4, 5]), answer([1, 2], [6], number=1)])
    twin = copy.deepcopy(learner.policy)
    distance = kl(kind, twin(batch).logprobs_N, learner.reference(batch).logprobs_N).mean()
    (0.7 * distance).backward()
    metrics = learner.step(batch).metrics
    assert metrics["kl/reference"] == pytest.approx(distance.item(), rel=1e-5)
    assert_same_gradient(gradient(learner), {f"lm.{name}": p.grad for name, p in twin.lm.named_parameters()})


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_as_a_reward(kind, build):
    learner = build("none", KLSettings(kind=kind, coef=0.7, applied_as="reward"), normalize_advantages="none")
    batch = collate([answer([1, 2], [3, 4, 5], 2.0, logprobs=[-5.0, -6.0, -5.5])])
    reference = learner.reference(batch).logprobs_N.tolist()
    d = [old - ref for old, ref in zip([-5.0, -6.0, -5.5], reference, strict=True)]
    estimate = {"k1": d, "k2": [x * x / 2 for x in d], "k3": [math.exp(-x) - 1 + x for x in d]}[kind]
    rewards = [-0.7 * estimate[0], -0.7 * estimate[1], 2.0 - 0.7 * estimate[2]]
    scored = learner._score(batch, torch.from_numpy(batch.rewards_N))
    assert scored.returns_N.tolist() == pytest.approx([sum(rewards[t:]) for t in range(3)], abs=1e-4)
    assert "kl/reference" in learner.step(batch).metrics


def test_the_reference_stays_as_it_was(build):
    learner = build("head", KLSettings(kind="k3", coef=0.5, applied_as="loss"))
    before = {name: p.clone() for name, p in learner.reference.named_parameters()}
    for _ in range(2):
        learner.step(collate(BATCH))
    assert same_bits(before, dict(learner.reference.named_parameters()))
    assert all(p.grad is None for p in learner.reference.parameters())


@pytest.mark.parametrize(("target", "grows"), [(1e-6, True), (1e3, False)])
def test_an_adaptive_weight_follows_the_divergence(target, grows, build):
    learner = build("none", KLSettings(kind="k3", coef=0.1, applied_as="loss", target=target, horizon=160))
    metrics = learner.step(collate(BATCH)).metrics
    change = 1 + 0.2 * len(BATCH) / 160 if grows else 1 - 0.2 * len(BATCH) / 160
    assert metrics["kl/coef"] == 0.1 and learner.kl_coef == pytest.approx(0.1 * change)
    assert "kl/coef" not in build("none", KLSettings(kind="k3", coef=0.1)).step(collate(BATCH)).metrics


@pytest.mark.parametrize("epochs", [1, 2], ids=["one pass", "a pass of its own"])
def test_a_correction_measures_ratios_from_the_step_s_beginning(epochs, build):
    correction = CorrectionSettings(correction="token_tis", correction_high=1.5)
    learner = build("none", correction=correction, algorithm="grpo", epochs=epochs, grad_clip=NO_CLIP)
    batch = collate(BATCH)
    proximal = copy.deepcopy(learner.policy)(batch).logprobs_N.detach()
    scored = learner._score(batch, torch.from_numpy(batch.rewards_N))
    assert_close(scored.old_logprobs_N, proximal)
    ratio = (proximal - torch.from_numpy(batch.old_logprobs_N)).exp().clamp(max=1.5)
    lengths = torch.from_numpy(batch.episode_length_E).long()
    assert_close(scored.weights_N, ratio / lengths.repeat_interleave(lengths))
    share = (ratio.sum() ** 2 / (len(ratio) * ratio.square().sum())).item()
    assert learner.step(batch).metrics["correction/effective_share"] == pytest.approx(share, rel=1e-4)
    assert "correction/effective_share" not in build("none").step(batch).metrics


@pytest.mark.parametrize("budget", [4096, 25], ids=["one pass", "micro-batches"])
def test_details_tell_of_each_token_what_the_step_saw_and_where_it_pushed(budget, build):
    learner = build("none", algorithm="reinforce", microbatch_tokens=budget)
    batch = collate(BATCH, "mask")
    logprobs_N = copy.deepcopy(learner.policy)(batch).logprobs_N.detach()
    (details,) = learner.step(batch).details
    assert details.index_E.tolist() == batch.index_E.tolist() and len(details.push_N) == len(batch.target_N)
    np.testing.assert_allclose(details.logprobs_N, logprobs_N, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(details.push_N, details.advantages_N * batch.loss_mask_N, rtol=1e-6)
    assert not details.values_N.any()


def test_a_clipped_token_is_not_pushed(build):
    learner = build("none", normalize_advantages="none", epochs=2)
    far = [-0.01, -12.0]  # The policy's own are near -5.5: one ratio is far below the clip, one far above.
    batch = collate([answer([1, 2], [3, 4], reward, logprobs=far, number=n) for n, reward in enumerate((1.0, -1.0))])
    (details,) = learner.step(batch).details
    assert details.advantages_N.tolist() == [1.0, 1.0, -1.0, -1.0]
    assert [push > 0 for push in details.push_N] == [True, False, False, False]
    assert details.push_N[1] == details.push_N[2] == 0 and details.push_N[3] < 0


def test_no_reference_no_kl_figure(build):
    assert "kl/reference" not in build().step(collate(BATCH)).metrics


def test_critic_warm_up_changes_only_the_value_head(build):
    learner = build(critic_warmup_steps=2, weight_decay=0.1, entropy_coef=0.1, epochs=2)
    for _ in range(2):
        before = parameters(learner)
        learner.step(collate(BATCH))
        after = parameters(learner)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"value_head.weight", "value_head.bias"}
    before = parameters(learner)
    learner.step(collate(BATCH))
    assert all(not torch.equal(before[name], p) for name, p in parameters(learner).items())


def test_critic_warm_up_without_a_critic_is_none(build):
    learner, plain = build("none", critic_warmup_steps=3), build("none")
    learner.step(collate(BATCH))
    plain.step(collate(BATCH))
    assert same_bits(parameters(learner), parameters(plain))


def test_the_value_head_has_a_learning_rate_of_its_own(build):
    """AdamW's first step is as long as the learning rate."""
    learner = build(learning_rate=1e-5, value_learning_rate=0.5)
    before = parameters(learner)
    learner.step(collate(BATCH))
    moved = {name: (p - before[name]).abs().max().item() for name, p in parameters(learner).items()}
    assert moved["value_head.bias"] == pytest.approx(0.5, rel=1e-3)
    assert max(d for name, d in moved.items() if name.startswith("lm.")) == pytest.approx(1e-5, rel=2e-2)


def test_weight_decay_is_for_the_language_model_alone(build):
    learner = build(weight_decay=0.5, learning_rate=1e-2, value=1.0)
    before = parameters(learner)
    learner.optimizer.step(0.0, 1.0, 1.0)
    after = parameters(learner)
    assert_close(after["lm.model.norm.weight"], before["lm.model.norm.weight"] * (1 - 0.5e-2))
    assert torch.equal(after["value_head.weight"], before["value_head.weight"])


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5]),
    ],
)
def test_learning_rate_schedules(schedule, expected):
    settings = LearnerSettings(lr_schedule=schedule, warmup_steps=2)
    factors = [rate_factor(settings, step, total_steps=6) for step in range(5)]
    assert factors == pytest.approx(expected, abs=1e-6)
    assert rate_factor(settings, 600, 6) == (1.0 if schedule == "constant" else 0.0)


def test_the_learning_rate_told_is_the_one_used(build):
    learner = build(learning_rate=1e-3, lr_schedule="linear", warmup_steps=2)
    told, moved = [], []
    for _ in range(4):
        before = parameters(learner)
        told.append(learner.step(collate(BATCH)).metrics["learning_rate"])
        moved.append(max((p - before[n]).abs().max() for n, p in parameters(learner).items() if n[0] == "l").item())
    assert told == pytest.approx([5e-4, 1e-3, 1e-3, 8.75e-4])
    assert moved[0] == pytest.approx(told[0], rel=2e-2)
    assert moved[1] > 1.5 * moved[0]


def test_the_gradient_is_clipped_by_its_global_norm(build):
    learner = build(grad_clip=1e-3)
    assert learner.step(collate(BATCH)).metrics["grad_norm"] > 1e-3
    assert learner.optimizer.flat[:-1].norm() == pytest.approx(1e-3, rel=1e-4)


# Learning.


def draw(policy: Policy, prompts: list[list[int]], length: int, generator: torch.Generator) -> list[list[int]]:
    """Samples `length` tokens after each prompt, all of one length, from the policy itself."""
    rows = torch.tensor(prompts)
    for _ in range(length):
        packing = attention.Packing.of_equals(*rows.shape)
        positions = torch.arange(rows.shape[1]).repeat(len(rows))
        hidden = policy.lm.base_model(
            input_ids=rows.reshape(1, -1), position_ids=positions[None], packing=packing
        ).last_hidden_state[0]
        last = hidden.view(*rows.shape, -1)[:, -1]
        choice = torch.multinomial((last @ policy.head_weight_VD.T).softmax(-1), 1, generator=generator)
        rows = torch.cat([rows, choice], 1)
    return rows[:, -length:].tolist()


@torch.no_grad()
def play(learner: PolicyLearner, generator: torch.Generator, samples: int = 96) -> list[Trajectory]:
    """Two questions; each has one token that is worth something, and a reward is the share of such tokens."""
    trajectories = []
    for group, (prompt, good) in enumerate([([10, 11, 12], 77), ([20, 21, 22], 99)]):
        answers = draw(learner.policy, [prompt] * samples, 2, generator)
        group_of = [
            answer(prompt, ids, ids.count(good) / 2, group=str(group), number=n) for n, ids in enumerate(answers)
        ]
        logprobs = learner.policy(collate(group_of)).logprobs_N.view(samples, 2).tolist()
        trajectories += [
            answer(prompt, ids, ids.count(good) / 2, group=str(group), number=n, logprobs=logs)
            for n, (ids, logs) in enumerate(zip(answers, logprobs, strict=True))
        ]
    return trajectories


def test_it_learns(build):
    """PPO with its critic finds the two good tokens among 260, from a mean reward of about 0.004."""
    learner = build(learning_rate=3e-3, value_learning_rate=1e-2, epochs=2, minibatches=2)
    generator = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(120):
        trajectories = play(learner, generator)
        curve.append(float(np.mean([t.reward for t in trajectories])))
        if curve[-1] >= 0.95:
            break
        result = learner.step(collate(trajectories))
        assert result.diverged is None
    assert curve[0] <= 0.3
    assert curve[-1] >= 0.9, curve
