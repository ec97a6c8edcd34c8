"""Supervised steps: the loss and gradient of plain cross-entropy, whatever the packing, and a policy that learns."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rollcast_learners.batch import collate
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import KLSettings, LearnerSettings
from rollcast_learners.supervised import SupervisedLearner
from rollcast_learners.types import Prompt, Stream, Trajectory, Turn


def example(number: int, prompt: list[int], answer: list[int]) -> Trajectory:
    ids = [*prompt, *answer]
    trained = np.arange(len(ids)) >= len(prompt)
    stream = Stream(np.array(ids, np.int32), trained, np.zeros(len(ids), np.float32), ())
    turn = Turn(0, len(prompt), len(ids), "", "", 0.0, "stop")
    return Trajectory(Prompt(str(number), str(number), "x", number), (stream,), (turn,), True, False)


def examples(count: int, seed: int = 0) -> list[Trajectory]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 9, (count, 2)).tolist()
    return [
        example(i, draw.integers(0, 256, prompt).tolist(), draw.integers(0, 256, answer).tolist())
        for i, (prompt, answer) in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def policy(tiny_fp32) -> Policy:
    return Policy(PolicySettings(tiny_fp32, "float32", "none"))


def learner(policy: Policy, **settings) -> SupervisedLearner:
    chosen = LearnerSettings(critic="none", grad_clip=1e9, **settings)
    return SupervisedLearner(copy.deepcopy(policy), chosen, KLSettings(), temperature=1.0, total_steps=20)


def plain_loss(path: str, batch: list[Trajectory]) -> torch.Tensor:
    """Hugging Face's own forward pass, one example at a time, and the mean over all answer tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    losses = []
    for one in batch:
        ids = torch.from_numpy(one.streams[0].token_ids_T.astype(np.int64))
        logprobs = torch.log_softmax(model(ids.unsqueeze(0)).logits[0, :-1], -1)
        picked = logprobs.gather(-1, ids[1:, None]).squeeze(-1)
        losses.append(-picked[torch.from_numpy(one.streams[0].trained_T[1:])])
    return torch.cat(losses).mean()


def test_a_step_is_plain_cross_entropy_whatever_the_micro_batches(policy, tiny_fp32) -> None:
    batch = examples(12)
    expected = plain_loss(tiny_fp32, batch).item()
    gradients = []
    for microbatch_tokens in (4096, 16):
        one = learner(policy, microbatch_tokens=microbatch_tokens)
        result = one.step(collate(batch))
        assert result.diverged is None
        assert abs(result.metrics["loss/supervised"] - expected) < 1e-5
        gradients.append(one.optimizer.flat[:-1].clone())
    largest = gradients[0].abs().max().item()
    assert largest > 0
    assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5 * largest)


def test_the_gradient_is_that_of_plain_cross_entropy(policy, tiny_fp32) -> None:
    batch = examples(6, seed=1)
    one = learner(policy)
    one.step(collate(batch))
    model = AutoModelForCausalLM.from_pretrained(tiny_fp32, dtype=torch.float32)
    ids = [torch.from_numpy(t.streams[0].token_ids_T.astype(np.int64)) for t in batch]
    trained = sum(t.sampled_tokens for t in batch)
    loss = torch.zeros(())
    for row, one_example in zip(ids, batch, strict=True):
        logprobs = torch.log_softmax(model(row.unsqueeze(0)).logits[0, :-1], -1)
        picked = logprobs.gather(-1, row[1:, None]).squeeze(-1)
        loss = loss - picked[torch.from_numpy(one_example.streams[0].trained_T[1:])].sum() / trained
    loss.backward()
    theirs = {f"lm.{name}": p.grad for name, p in model.named_parameters()}
    for name, grad in zip(one.optimizer.names, one.optimizer.grads, strict=True):
        if name.startswith("lm."):
            atol = 1e-5 * max(theirs[name].abs().max().item(), 1e-6)
            assert_close(grad, theirs[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_held_out_loss_is_measured_and_falls_on_what_is_learned(policy, tiny_fp32) -> None:
    batch = examples(8, seed=2)
    one = learner(policy, learning_rate=1e-2)
    before = one.held_out_loss(collate(batch))
    assert abs(before - plain_loss(tiny_fp32, batch).item()) < 1e-5
    for _ in range(10):
        one.step(collate(batch))
    assert one.held_out_loss(collate(batch)) < before - 1.0
    assert set(one.step(collate(batch)).metrics) >= {"loss/supervised", "loss/entropy", "grad_norm", "learning_rate"}
    assert "clip_fraction" not in one.step(collate(batch)).metrics
