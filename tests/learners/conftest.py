"""What the learner's tests share: learners on the tiny model, and one thread.

Their tensors are tiny, and on busy cores every barrier between threads costs a time slice.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rollcast_learners.learner import PolicyLearner
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tiny_fp32) -> dict[str, Policy]:
    """Loaded once; every learner gets copies."""
    return {critic: Policy(PolicySettings(tiny_fp32, "float32", critic)) for critic in ("head", "none")}


@pytest.fixture
def build(models) -> Callable[..., PolicyLearner]:
    def builder(
        critic: str = "head",
        kl_settings: KLSettings | None = None,
        value: float = 0.0,
        correction: CorrectionSettings | None = None,
        **settings: Any,
    ) -> PolicyLearner:
        policy = copy.deepcopy(models[critic])
        with torch.no_grad():  # A critic that already says something, where `value` is not 0.
            policy.value_head.weight.copy_(value * torch.sin(torch.arange(policy.value_head.in_features)))
        reference = None
        if kl_settings is not None:
            reference = copy.deepcopy(models[critic]).requires_grad_(False)
            with torch.no_grad():
                reference.lm.model.layers[0].mlp.down_proj.weight.mul_(-1)
        return PolicyLearner(
            policy,
            LearnerSettings(critic=critic, **settings),
            kl_settings or KLSettings(),
            correction,
            temperature=1.0,
            total_steps=10,
            answer_tokens=6,
            reference=reference,
        )

    return builder
