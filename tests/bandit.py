"""A small text task that a random language model learns in seconds, and the loop around it.

Four questions, each answered with three tokens; a token is right when its id, modulo four, is the question's number.
Owns: playing it, token by token, and stepping a learner with fresh or with old samples. Does not know what is asserted.
"""

import copy

import numpy as np
import torch

from rollcast_learners import attention
from rollcast_learners.batch import collate
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.policy import Policy
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from rollcast_learners.types import Trajectory
from trajectories import answer

QUESTIONS, SAMPLES, TOKENS = 4, 8, 3
MOST_STEPS = 80


@torch.no_grad()
def sampled(policy: Policy, prompts_RL: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """TOKENS further tokens of each row and their log-probabilities, at temperature 1."""
    rows, logprobs = prompts_RL, []
    for _ in range(TOKENS):
        count, length = rows.shape
        packing = attention.Packing.of_equals(count, length)
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
    *,
    staleness: int = 0,
    seed: int = 0,
    steps: int = MOST_STEPS,
    enough: float = 0.95,
) -> tuple[float, float]:
    """Reward before and after `steps`, or when a step's samples are good `enough`.

    The samples of a step are of the policy as it was `staleness` steps before.
    """
    kl = kl or KLSettings()
    before = mean_reward(policy)
    reference = copy.deepcopy(policy).requires_grad_(False) if kl.kind != "none" else None
    fixed = {"temperature": 1.0, "total_steps": steps, "answer_tokens": TOKENS, "reference": reference}
    learner = PolicyLearner(policy, settings, kl, correction, seed=seed, **fixed)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    behind = [copy.deepcopy(policy) for _ in range(staleness)]
    for _ in range(steps):
        trajectories = played(behind[0] if behind else policy, generator)
        assert learner.step(collate(trajectories)).diverged is None
        behind = [*behind[1:], copy.deepcopy(policy)] if behind else []
        if np.mean([t.reward for t in trajectories]) > enough:
            break
    return before, mean_reward(policy)
