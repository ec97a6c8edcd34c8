"""Low-rank adapters: the same numbers as peft's own model and as the merged weights, and nothing else is trained."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rollcast_learners import adapters, state
from rollcast_learners.batch import collate
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import KLSettings, LearnerSettings, LoraSettings
from trajectories import random_episodes

LORA = LoraSettings(rank=4, alpha=8)
BATCH = collate(random_episodes(3))


def adapted(folder: str, lora: LoraSettings = LORA, dtype: str = "float32", critic: str = "head") -> Policy:
    """A policy whose adapter says something: B starts at zero."""
    policy = Policy(PolicySettings(folder, dtype, critic, adapter=lora))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(40).view(2, 20) * 3 % 250).logits


def learner_of(policy: Policy, **settings: object) -> PolicyLearner:
    made = LearnerSettings(critic=policy.settings.critic, learning_rate=1e-2, **settings)
    return PolicyLearner(policy, made, KLSettings(), temperature=1.0, total_steps=10)


def test_the_first_policy_is_the_model_itself(tiny_fp32: str) -> None:
    fresh, plain = (
        Policy(PolicySettings(tiny_fp32, "float32", adapter=LORA)),
        Policy(PolicySettings(tiny_fp32, "float32")),
    )
    assert_close(fresh(BATCH).logprobs_N, plain(BATCH).logprobs_N)


def test_only_adapters_and_the_critic_learn(tiny_fp32: str) -> None:
    learner = learner_of(adapted(tiny_fp32))
    names = {name for name, p in learner.policy.named_parameters() if p.requires_grad}
    assert names == set(learner.optimizer.names)
    assert all(".lora_" in name or name.startswith("value_head.") for name in names)
    before = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    learner.step(BATCH)
    changed = {name for name, p in learner.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_compute_in_the_models_dtype(dtype: str, tiny_fp32: str) -> None:
    policy = adapted(tiny_fp32, dtype=dtype)
    assert {p.dtype for p in policy.lm.parameters()} == {getattr(torch, dtype)}


def test_published_tensors_are_what_peft_writes_and_reads(tiny_fp32: str, tmp_path: Path) -> None:
    policy = adapted(tiny_fp32)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_fp32),
        LoraConfig(r=4, lora_alpha=8, target_modules=list(LORA.targets), task_type="CAUSAL_LM"),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    published = dict(policy.published())
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {n: t.shape for n, t in published.items()} == {n: t.shape for n, t in saved.items()}

    ours = tmp_path / "ours"
    ours.mkdir()
    save_file(published, ours / "adapter_model.safetensors")
    (ours / "adapter_config.json").write_text(adapters.describe(LORA))
    assert (
        json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()).items()
        >= {"r": 4, "lora_alpha": 8}.items()
    )
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_fp32, dtype=torch.float32), ours)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tiny_fp32, dtype=torch.float32)
        merged = dict(adapters.merged(plain.named_parameters(), published, LORA.scale))
        plain.load_state_dict(merged, strict=False)
        assert_close(logits_of(plain), logits_of(read), rtol=1e-4, atol=1e-5)


def test_merged_weights_are_the_policy(tiny_fp32: str) -> None:
    policy = adapted(tiny_fp32, LORA.model_copy(update={"publish": "merged"}))
    plain = Policy(PolicySettings(tiny_fp32, "float32"))
    published = dict(policy.published())
    assert published.keys() == dict(plain.published()).keys()
    plain.lm.load_state_dict(published, strict=False)
    assert_close(plain(BATCH).logprobs_N, policy(BATCH).logprobs_N, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_its_weight_is_refused(tiny_fp32: str) -> None:
    published = dict(adapted(tiny_fp32).published())
    with pytest.raises(ValueError, match=r"no weight model\.layers\.0"):
        dict(adapters.merged([("model.norm.weight", torch.ones(64))], published, 1.0))


def test_switched_off_it_is_the_reference_at_no_memory(tiny_fp32: str) -> None:
    policy, plain = adapted(tiny_fp32), Policy(PolicySettings(tiny_fp32, "float32"))
    with_it = policy(BATCH).logprobs_N
    reference = policy.without_adapter()(BATCH)
    assert_close(reference.logprobs_N, plain(BATCH).logprobs_N)
    assert not reference.logprobs_N.requires_grad
    assert torch.equal(policy(BATCH).logprobs_N, with_it), "and it is on again"


def test_layers_that_are_not_there_are_told_with_those_that_are(tiny_fp32: str) -> None:
    with pytest.raises(ValueError, match=r"called c_attn.*lora\.targets.*q_proj"):
        Policy(PolicySettings(tiny_fp32, adapter=LoraSettings(rank=4, targets=("c_attn",))))


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_a_saved_learner_goes_on_as_if_nothing_had_happened(critic: str, tiny_fp32: str, tmp_path: Path) -> None:
    first, second = (learner_of(adapted(tiny_fp32, critic=critic)) for _ in range(2))
    first.step(BATCH)
    state.save(first, tmp_path)
    state.load(second, tmp_path)
    assert first.step(BATCH).metrics == second.step(BATCH).metrics
    for (name, ours), theirs in zip(first.policy.named_parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    saved = state.saved_policy(tmp_path, lambda _: "bfloat16")
    assert saved.keys() == dict(first.policy.published()).keys()
    assert all(adapters.is_adapter(name) and tensor.dtype == torch.bfloat16 for name, tensor in saved.items())


def test_activation_checkpointing_and_adapters_go_together(tiny_fp32: str) -> None:
    grads = []
    for checkpointing in (False, True):
        settings = PolicySettings(tiny_fp32, "float32", adapter=LORA, activation_checkpointing=checkpointing)
        policy = Policy(settings)
        policy(BATCH).logprobs_N.sum().backward()
        grads.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad)
