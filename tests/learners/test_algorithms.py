"""Every algorithm by its name against its paper's formula: loss and gradient on 1,000 random ragged batches.

The references here are written answer by answer, in float64 and in the papers' own terms; ours are packed and float32.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rollcast_learners.algorithms import ALGORITHMS, AlgorithmName
from rollcast_learners.batch import Batch, collate
from rollcast_learners.learner import LOSSES, Columns
from rollcast_learners.policy import Outputs, Policy, PolicySettings
from rollcast_learners.scoring import ReferenceScores, Scorer
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from trajectories import answer

CASES = 1000
ANSWER_TOKENS = 7
TEMPERATURE = 0.3


class Answer(NamedTuple):
    """One answer of a batch, as the papers see it: float64, its log-probabilities a leaf of the graph."""

    logprobs: Tensor
    old: Tensor
    values: Tensor
    normalizers: Tensor
    reference: Tensor
    reference_normalizers: Tensor
    reward: float
    group: int


Reference = Callable[[list[Answer], LearnerSettings], Tensor]


def clip(ratio: Tensor, s: LearnerSettings) -> Tensor:
    return ratio.clamp(1 - s.clip_low, 1 + s.clip_high)


def surrogate(one: Answer, advantage: Tensor | float, s: LearnerSettings) -> Tensor:
    """PPO's, token by token."""
    ratio = (one.logprobs - one.old).exp()
    return torch.minimum(ratio * advantage, clip(ratio, s) * advantage)


def tokens(answers: list[Answer]) -> int:
    return sum(len(one.logprobs) for one in answers)


def group_of(one: Answer, answers: list[Answer]) -> np.ndarray:
    return np.array([other.reward for other in answers if other.group == one.group])


def standard(one: Answer, answers: list[Answer]) -> float:
    """GRPO's advantage, equation of section 4.1.2; a group without spread says nothing."""
    rewards = group_of(one, answers)
    return float((one.reward - rewards.mean()) / (rewards.std() + 1e-8)) if rewards.std() > 1e-6 else 0.0


def whitened(advantages: list[Tensor]) -> list[Tensor]:
    together = torch.cat(advantages)
    return [(a - together.mean()) / (together.std(correction=0) + 1e-8) for a in advantages]


def constant(value: float, one: Answer) -> Tensor:
    return torch.full((len(one.logprobs),), value, dtype=torch.float64)


def gae_of(one: Answer, s: LearnerSettings) -> Tensor:
    """Schulman et al. 2015, equation 16, as a double sum."""
    length = len(one.logprobs)
    rewards = [0.0] * (length - 1) + [one.reward]
    values = [*one.values.tolist(), 0.0]
    deltas = [rewards[t] + s.gamma * values[t + 1] - values[t] for t in range(length)]
    sums = [sum((s.gamma * s.lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
    return torch.tensor(sums, dtype=torch.float64)


def ppo(answers: list[Answer], s: LearnerSettings) -> Tensor:
    advantages = whitened([gae_of(one, s) for one in answers])
    worth = sum(surrogate(one, a, s).sum() for one, a in zip(answers, advantages, strict=True))
    return -worth / tokens(answers)


def reinforce(answers: list[Answer], s: LearnerSettings) -> Tensor:
    returns = [s.gamma ** torch.arange(len(o.logprobs) - 1, -1, -1, dtype=torch.float64) * o.reward for o in answers]
    baseline = torch.cat(returns).mean()
    return -sum(((g - baseline) * one.logprobs).sum() for one, g in zip(answers, returns, strict=True)) / tokens(
        answers
    )


def actor_critic(answers: list[Answer], s: LearnerSettings) -> Tensor:
    return -sum((gae_of(one, s) * one.logprobs).sum() for one in answers) / tokens(answers)


def grpo(answers: list[Answer], s: LearnerSettings) -> Tensor:
    return -sum(surrogate(one, standard(one, answers), s).mean() for one in answers) / len(answers)


def dr_grpo(answers: list[Answer], s: LearnerSettings) -> Tensor:
    worth = [surrogate(one, one.reward - group_of(one, answers).mean(), s).sum() / ANSWER_TOKENS for one in answers]
    return -sum(worth) / len(answers)


def rloo(answers: list[Answer], s: LearnerSettings) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for one in answers:
        rewards = group_of(one, answers)
        others = (rewards.sum() - one.reward) / (len(rewards) - 1)
        loss = loss - (one.reward - others) * one.logprobs.sum()
    return loss / len(answers) / ANSWER_TOKENS


def reinforce_pp(answers: list[Answer], s: LearnerSettings) -> Tensor:
    advantages = whitened([constant(one.reward, one) for one in answers])
    return -sum(surrogate(o, a, s).sum() for o, a in zip(answers, advantages, strict=True)) / tokens(answers)


def reinforce_pp_baseline(answers: list[Answer], s: LearnerSettings) -> Tensor:
    centred = [constant(one.reward - group_of(one, answers).mean(), one) for one in answers]
    advantages = whitened(centred)
    return -sum(surrogate(o, a, s).sum() for o, a in zip(answers, advantages, strict=True)) / tokens(answers)


def dapo(answers: list[Answer], s: LearnerSettings) -> Tensor:
    return -sum(surrogate(one, standard(one, answers), s).sum() for one in answers) / tokens(answers)


def gspo(answers: list[Answer], s: LearnerSettings) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for one in answers:
        ratio = ((one.logprobs - one.old).sum() / len(one.logprobs)).exp()
        advantage = standard(one, answers)
        loss = loss - torch.minimum(ratio * advantage, clip(ratio, s) * advantage)
    return loss / len(answers)


def cispo(answers: list[Answer], s: LearnerSettings) -> Tensor:
    worth = [
        (clip((one.logprobs - one.old).exp(), s).detach() * standard(one, answers) * one.logprobs).sum()
        for one in answers
    ]
    return -sum(worth) / tokens(answers)


def soft_q(answers: list[Answer], s: LearnerSettings) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for one in answers:
        length = len(one.logprobs)
        for t in range(length):
            value = TEMPERATURE * (one.normalizers[t] - one.reference_normalizers[t])
            gain = torch.zeros((), dtype=torch.float64)
            for k in range(t, length):
                reward = one.reward if k == length - 1 else 0.0
                pull = TEMPERATURE * (one.logprobs[k] - one.reference[k])
                gain = gain + s.gamma ** (k - t) * (reward - pull)
            loss = loss + 0.5 * (gain - value) ** 2
    return loss / tokens(answers)


REFERENCES: dict[AlgorithmName, Reference] = {
    "ppo": ppo,
    "reinforce": reinforce,
    "actor_critic": actor_critic,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_pp,
    "reinforce++_baseline": reinforce_pp_baseline,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "soft_q": soft_q,
}


class Case(NamedTuple):
    batch: Batch
    answers: list[Answer]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [make_case(np.random.default_rng([8, number])) for number in range(CASES)]


def make_case(rng: np.random.Generator) -> Case:
    """One to three groups of two to four answers, one to ANSWER_TOKENS tokens each; some groups are all alike."""
    trajectories, answers = [], []
    for group in range(int(rng.integers(1, 4))):
        alike = rng.random() < 0.1
        for number in range(int(rng.integers(2, 5))):
            length = int(rng.integers(1, ANSWER_TOKENS + 1))
            old = -rng.exponential(2.0, length).astype(np.float32)
            reward = 0.5 if alike else float(np.float32(rng.normal()))
            ids = rng.integers(0, 256, length).tolist()
            trajectories.append(answer([1, 2], ids, reward, logprobs=old.tolist(), group=str(group), number=number))
            columns = [old + moved(rng, length), old, *rng.normal(size=(4, length))]
            exact = [torch.tensor(column, dtype=torch.float32).double() for column in columns]
            leaves = exact[0].requires_grad_(), exact[1], exact[2], exact[3].requires_grad_(), *exact[4:]
            answers.append(Answer(*leaves, reward, group))
    return Case(collate(trajectories), answers)


def moved(rng: np.random.Generator, length: int) -> np.ndarray:
    """How far the policy moved at each token, on both sides of GSPO's narrow clip too, but not on its very edge: there
    float32 may fall on the other side."""
    spread = 0.3 if rng.random() < 0.7 else 4e-4
    while True:
        change = rng.normal(scale=spread, size=length)
        if all(abs(np.expm1(change.mean()) - edge) > 1e-5 for edge in (-3e-4, 4e-4)):
            return change


def packed(answers: list[Answer], name: str) -> Tensor:
    return torch.cat([getattr(one, name).detach() for one in answers]).float()


def settings_of(name: AlgorithmName) -> LearnerSettings:
    extra = {"gamma": 0.9, "lam": 0.8} if name in ("ppo", "actor_critic") else {}
    extra = {"gamma": 0.9} if name in ("reinforce", "soft_q") else extra
    return LearnerSettings(algorithm=name, **extra)


@pytest.fixture(scope="module")
def policies(tiny_fp32: str) -> dict[str, Policy]:
    return {critic: Policy(PolicySettings(tiny_fp32, "float32", critic)) for critic in ("head", "none")}


def test_every_algorithm_has_a_reference() -> None:
    assert set(REFERENCES) == set(ALGORITHMS) == set(get_args(AlgorithmName))


@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradient_equal_the_papers_formula(name: AlgorithmName, cases, policies) -> None:
    settings = settings_of(name)
    fixed = KLSettings(), CorrectionSettings(), 1.0, ANSWER_TOKENS, lambda tensor: None
    scorer = Scorer(policies[settings.critic], None, settings, *fixed)
    learned = 0
    for batch, answers in cases:
        logprobs_N, normalizers_N = (packed(answers, column).requires_grad_() for column in ("logprobs", "normalizers"))
        values_N = packed(answers, "values") if settings.critic == "head" else torch.zeros(len(logprobs_N))
        outputs = Outputs(logprobs_N, logprobs_N, normalizers_N, values_N, torch.zeros(batch.episodes))
        scored = scorer.score(batch, torch.from_numpy(batch.rewards_N.copy()), TEMPERATURE, outputs)
        theirs = ReferenceScores(packed(answers, "reference"), packed(answers, "reference_normalizers"))
        scored = replace(scored, reference=theirs)
        mask_N, lengths_E = torch.from_numpy(batch.loss_mask_N), torch.from_numpy(batch.episode_length_E).long()
        columns = Columns(outputs, scored, torch.arange(len(logprobs_N)), mask_N, lengths_E, settings, TEMPERATURE)
        loss = LOSSES[ALGORITHMS[name].loss](columns)[0] / scorer.counted(batch)
        expected = REFERENCES[name](answers, settings)
        assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        leaves = [one.logprobs for one in answers], [one.normalizers for one in answers]
        for ours, exact in zip((logprobs_N, normalizers_N), leaves, strict=True):
            found = torch.autograd.grad(loss, ours, retain_graph=True, allow_unused=True)[0]
            wanted = torch.autograd.grad(expected, exact, retain_graph=True, allow_unused=True)
            if found is not None:
                gradient = torch.cat(
                    [torch.zeros_like(x) if g is None else g for g, x in zip(wanted, exact, strict=True)]
                )
                assert_close(found.double(), gradient, rtol=1e-5, atol=1e-5)
                learned += int(found.abs().sum() > 0)
    assert learned > 0.8 * CASES
