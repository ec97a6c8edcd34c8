"""Every algorithm solves a small text task: from a reward of at most 0.3 to at least 0.9, in seconds.

Four questions, each answered with three tokens; a token is right when its id, modulo four, is the question's number.
The policy is a real language model that starts at random, sampled here token by token.
"""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rollcast_learners import attention
from rollcast_learners.algorithms import ALGORITHMS, AlgorithmName
from rollcast_learners.batch import collate
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from rollcast_learners.types import Trajectory
from trajectories import answer

QUESTIONS, SAMPLES, TOKENS = 4, 8, 3
MOST_STEPS = 80


@pytest.fixture(scope="module")
def policies(tiny_fp32: str) -> Callable[[str], Policy]:
    loaded = {critic: Policy(PolicySettings(tiny_fp32, "float32", critic)) for critic in ("head", "separate", "none")}
    return lambda critic: copy.deepcopy(loaded[critic])


@torch.no_grad()
def sampled(policy: Policy, prompts_RL: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """TOKENS further tokens of each row and their log-probabilities, at temperature 1."""
    rows, logprobs = prompts_RL, []
    for _ in range(TOKENS):
        count, length = rows.shape
        packing = attention.Packing(tuple(attention.Piece(length, (row,), None) for row in range(count)))
        hidden = policy.lm.base_model(
            input_ids=rows.reshape(1, -1),
            position_ids=torch.arange(length).repeat(count).unsqueeze(0),
            use_cache=False,
            packing=packing,
        ).last_hidden_state.view(count, length, -1)[:, -1]
        logs = (hidden @ policy.head_weight_VD.T).log_softmax(-1)
        token = torch.multinomial(logs.exp(), 1, generator=generator)
        logprobs.append(logs.gather(1, token))
        rows = torch.cat([rows, token], 1)
    return rows[:, -TOKENS:], torch.cat(logprobs, 1)


def played(policy: Policy, generator: torch.Generator, samples: int = SAMPLES) -> list[Trajectory]:
    """Every question, `samples` times each."""
    questions = torch.arange(QUESTIONS).repeat_interleave(samples)
    prompts = torch.stack([torch.full_like(questions, 60), questions + 65], 1)
    tokens, logprobs = sampled(policy, prompts, generator)
    rewards = (tokens % QUESTIONS == questions[:, None]).float().mean(1)
    return [
        answer(prompt, ids, reward, logprobs=logs, group=str(question), number=number % samples)
        for number, (prompt, ids, reward, logs, question) in enumerate(
            zip(*(t.tolist() for t in (prompts, tokens, rewards, logprobs, questions)), strict=True)
        )
    ]


def mean_reward(policy: Policy) -> float:
    return float(np.mean([t.reward for t in played(policy, torch.Generator().manual_seed(99), samples=64)]))


def solve(
    policy: Policy,
    settings: LearnerSettings,
    kl: KLSettings | None = None,
    correction: CorrectionSettings | None = None,
    staleness: int = 0,
) -> tuple[float, float]:
    """Reward before and after; the samples of a step are of the policy as it was `staleness` steps before."""
    kl = kl or KLSettings()
    before = mean_reward(policy)
    reference = copy.deepcopy(policy).requires_grad_(False) if kl.kind != "none" else None
    fixed = {"temperature": 1.0, "total_steps": MOST_STEPS, "answer_tokens": TOKENS, "reference": reference}
    learner = PolicyLearner(policy, settings, kl, correction, **fixed)
    generator = torch.Generator().manual_seed(0)
    behind = [copy.deepcopy(policy)] * staleness
    for _ in range(MOST_STEPS):
        trajectories = played(behind[0] if behind else policy, generator)
        assert learner.step(collate(trajectories)).diverged is None
        behind = [*behind[1:], copy.deepcopy(policy)] if behind else []
        if np.mean([t.reward for t in trajectories]) > 0.95:
            break
    return before, mean_reward(policy)


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
