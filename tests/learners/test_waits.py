"""How often the host waits for the device in a learning step: once for the verdict of each optimiser step, once at the
end. Counted on the CPU, where nothing waits: see `Waits`."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rollcast_learners.algorithms import ALGORITHMS
from rollcast_learners.batch import collate
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from rollcast_learners.supervised import SupervisedLearner
from trajectories import random_episodes

aten = torch.ops.aten
BY_VALUE = {
    aten._local_scalar_dense.default,  # item(), and int(), float() or bool() of a tensor
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
}
"""Operations whose result, or its shape, the host must know before it goes on."""
VERDICT, STEPPED, FIGURES = "tolist", "optimiser step", "cpu"


class Waits(TorchDispatchMode):
    """Notes every operation of `BY_VALUE`; indexing with a mask of booleans; `repeat_interleave` by a tensor without
    `output_size`. What a compiled kernel does inside is not seen, nor is a copy to the device."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = op in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        unsized = op is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if op in BY_VALUE or by_mask or unsized:
            self.events.append(str(op))
        return op(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes the calls by which Python takes numbers off a device: `tolist`, `cpu`, and `to("cpu")`. A move to another
    tensor's device is none, also where that is the CPU."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.tolist, Tensor.cpu):
            self.events.append(function.__name__)
        elif function is Tensor.to and any(isinstance(a, str) and a == "cpu" for a in args):
            self.events.append("cpu")
        return function(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    events: list[str] = []
    with Waits(events), Reads(events):
        yield events


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.where(x > 0),
    ],
)
def test_a_wait_is_noted(wait: Callable[[Tensor], object]) -> None:
    with waits() as events:
        wait(torch.tensor([1.0, 2.0]))
    assert len(events) == 1


def test_what_needs_no_answer_is_not() -> None:
    with waits() as events:
        x = torch.arange(3.0)
        torch.where(x > 0, x, 0.0).sum().to(torch.float64)
        x[torch.tensor([0, 2])] += x.repeat_interleave(torch.tensor([1, 1, 0]), output_size=2)
    assert events == []


@pytest.fixture(scope="module")
def policies(tiny_fp32: str) -> dict[str, Policy]:
    return {critic: Policy(PolicySettings(tiny_fp32, "float32", critic)) for critic in ("head", "none", "separate")}


def made(
    policies: dict[str, Policy], kl: KLSettings, correction: str, kind: type[PolicyLearner], settings: dict[str, Any]
) -> PolicyLearner:
    chosen = LearnerSettings(**settings)
    reference = policies[chosen.critic] if kl.kind != "none" else None
    return kind(
        copy.deepcopy(policies[chosen.critic]),
        chosen,
        kl,
        CorrectionSettings(correction=correction),
        temperature=0.9,
        total_steps=10,
        answer_tokens=6,
        reference=reference,
    )


def events_of(learner: PolicyLearner) -> list[str]:
    batch = collate(random_episodes(5, groups=4, samples=3), "bootstrap")
    learner.step(batch)
    with waits() as events:
        learner.optimizer.adamw.register_step_post_hook(lambda *_: events.append(STEPPED))
        result = learner.step(batch)
    assert result.diverged is None and result.metrics["guard/skipped_steps"] == 0
    return events


NO_KL = KLSettings()
VARIANTS: dict[str, tuple[KLSettings, str, type[PolicyLearner], dict[str, Any]]] = {
    **{
        name: (
            KLSettings(kind="k1", coef=0.1) if name == "soft_q" else NO_KL,
            "none",
            PolicyLearner,
            {"algorithm": name},
        )
        for name in ALGORITHMS
    },
    "micro-batches": (NO_KL, "none", PolicyLearner, {"microbatch_tokens": 25}),
    "a separate critic": (NO_KL, "none", PolicyLearner, {"critic": "separate"}),
    "groups": (NO_KL, "none", PolicyLearner, {"normalize_advantages": "group_then_batch"}),
    "divergence as a reward": (KLSettings(kind="k3", coef=0.1, target=0.1), "none", PolicyLearner, {}),
    "a corrected answer": (NO_KL, "sequence_tis", PolicyLearner, {"microbatch_tokens": 25}),
    "references": (NO_KL, "none", SupervisedLearner, {"critic": "none"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_waits_for_the_verdict_and_for_its_figures(variant: str, policies: dict[str, Policy]) -> None:
    kl, correction, kind, settings = VARIANTS[variant]
    assert events_of(made(policies, kl, correction, kind, settings)) == [VERDICT, STEPPED, FIGURES]


def test_every_optimiser_step_waits_once(policies: dict[str, Policy]) -> None:
    learner = made(policies, NO_KL, "none", PolicyLearner, {"epochs": 2, "minibatches": 2})
    assert events_of(learner) == [VERDICT, STEPPED] * 4 + [FIGURES]
