"""Compiled layers: the same numbers, for every kind of policy and batches of any length, compiled once.

Most tests take apart and put together what is compiled but leave out the compiler itself (`aot_eager`), which takes ten
seconds a time; one has it too.
"""

import functools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from rollcast_learners.batch import collate
from rollcast_learners.compiled import uncompiled
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import LoraSettings
from trajectories import answer, random_episodes

# Dynamo asks every tensor for its gradient, and hides that from all but whoever makes warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

KINDS = {
    "critic on the trunk": {},
    "separate critic": {"critic": "separate"},
    "checkpointed": {"activation_checkpointing": True},
    "adapters": {"adapter": LoraSettings(rank=4)},
}


@pytest.fixture
def counter(monkeypatch):
    """The compiler replaced by one that counts what it is given, and computes it as it stands."""
    torch.compiler.reset()
    counting = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    yield counting
    torch.compiler.reset()


def results(policy, batch):
    """Every output, and the gradients of something that depends on them all."""
    policy.zero_grad()
    outputs = policy(batch, 0.7)
    (outputs.logprobs_N.sum() + outputs.entropy_N.sum() + (outputs.values_N - 1).square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return dict(zip(outputs._fields, outputs, strict=True)) | gradients


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_say_the_same(kind, tiny_fp32, counter):
    policy = Policy(PolicySettings(tiny_fp32, "float32", compile=True, **KINDS[kind]))
    assert not any("forward" in name or "_orig_mod" in name for name in policy.state_dict())
    for seed in range(3):
        batch = collate(random_episodes(seed))
        ours = results(policy, batch)
        assert counter.frame_count > 0
        with uncompiled(policy):
            theirs = results(policy, batch)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.soak
def test_the_reference_of_adapters_is_compiled_too_and_still_the_model_itself(tiny_fp32, counter):
    policy = Policy(PolicySettings(tiny_fp32, "float32", compile=True, adapter=LoraSettings(rank=4)))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = collate(random_episodes(1))
    reference, plain = policy.without_adapter(), Policy(PolicySettings(tiny_fp32, "float32"))
    assert (policy(batch).logprobs_N - reference(batch).logprobs_N).abs().max() > 0.1
    assert_close(reference(batch).logprobs_N, plain(batch).logprobs_N, rtol=1e-5, atol=1e-5)


def test_all_layers_and_batches_of_any_length_share_what_was_compiled(tiny_fp32, counter):
    """Each compilation costs seconds, and no two micro-batches have the same number of rows."""
    policy = Policy(PolicySettings(tiny_fp32, "float32", compile=True))
    counts = []
    for length in (5, 40, 17, 90, 2, 33):
        batch = collate([answer([1, 2, 3], np.arange(length).tolist()), answer([1, 2, 3], [200, 201], number=1)])
        results(policy, batch)
        with torch.no_grad():
            policy(batch)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


def test_rounding_of_bfloat16_is_no_worse(tiny_bf16):
    """With the real compiler: it fuses, so that less is rounded in between."""
    torch.compiler.reset()
    policy, exact = Policy(PolicySettings(tiny_bf16, compile=True)), Policy(PolicySettings(tiny_bf16, "float32"))
    batch = collate(random_episodes(2, groups=12, samples=8))
    with torch.no_grad():
        true_N = exact(batch).logprobs_N
        compiled_N = policy(batch).logprobs_N
        with uncompiled(policy):
            written_N = policy(batch).logprobs_N
    assert not torch.equal(compiled_N, written_N)  # Something was compiled.
    assert (compiled_N - true_N).abs().mean() < 1.1 * (written_N - true_N).abs().mean()
    torch.compiler.reset()


def test_without_a_compiler_it_says_what_to_install(tiny_fp32, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler 'no-such-compiler'.*learner.compile to false"):
        Policy(PolicySettings(tiny_fp32, compile=True))
