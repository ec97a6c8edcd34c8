"""The packed forward pass against Hugging Face's plain one, sequence by sequence."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rollcast_learners import attention
from rollcast_learners.batch import NO_ROW, OnLength, collate
from rollcast_learners.policy import Outputs, Policy, PolicySettings
from rollcast_learners.types import Trajectory
from tiny_model import write_tiny_model
from trajectories import answer, episode, random_episodes

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make_policy(folder: str, dtype="float32", critic="head") -> Policy:
    """With a value head that is not zero, so that wrong values show."""
    policy = Policy(PolicySettings(folder, dtype=dtype, critic=critic))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        policy.value_head.weight.copy_(torch.randn(policy.value_head.weight.shape, generator=generator) * 0.1)
        policy.value_head.bias.fill_(0.2)
    return policy


def plain(
    policy: Policy, trajectories: list[Trajectory], temperature: float, on_length: OnLength
) -> tuple[Outputs, dict[str, Tensor]]:
    """Every stream alone through a plain Hugging Face model with the same numbers, and its parameters."""
    model = AutoModelForCausalLM.from_pretrained(policy.settings.path, dtype=policy.dtype)
    model.load_state_dict(policy.lm.state_dict())
    logprobs, entropies, normalizers, values, bootstrap = [], [], [], [], []
    for trajectory in trajectories:
        for stream in trajectory.streams:
            at = torch.from_numpy(np.flatnonzero(stream.trained_T))
            if not len(at):
                continue
            tokens = torch.from_numpy(stream.token_ids_T.astype(np.int64))
            hidden = model.model(input_ids=tokens[None]).last_hidden_state[0]
            logits = model.lm_head(hidden[at - 1]).float() / temperature
            logs = torch.log_softmax(logits, -1)
            normalizers.append(logits.logsumexp(-1))
            logprobs.append(logs[torch.arange(len(at)), tokens[at]])
            entropies.append(-(logs.exp() * logs).sum(-1))
            values.append(policy.value_head(hidden[at - 1].float()).squeeze(-1))
            end = policy.value_head(hidden[-1:].float()).detach().reshape(())
        cut = on_length == "bootstrap" and trajectory.turns[-1].finish_reason == "length"
        bootstrap.append(end if trajectory.truncated or cut else torch.zeros(()))
    columns = (torch.cat(column) for column in (logprobs, entropies, normalizers, values))
    outputs = Outputs(*columns, torch.stack(bootstrap))
    return outputs, dict(model.named_parameters())


def gradients(outputs: Outputs, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a mean in which every number has a weight of its own; the same weights for the same shapes."""
    generator = torch.Generator().manual_seed(5)
    columns = (outputs.logprobs_N, outputs.entropy_N, outputs.normalizers_N, outputs.values_N)
    loss = sum((torch.randn(len(c), generator=generator) * c).mean() for c in columns)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def check_equal_to_plain(policy: Policy, trajectories: list[Trajectory], temperature=1.0, on_length="zero") -> None:
    ours = policy(collate(trajectories, on_length), temperature)
    theirs, plain_names = plain(policy, trajectories, temperature, on_length)
    for name in Outputs._fields:
        assert_close(getattr(ours, name), getattr(theirs, name), **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    names = dict(policy.lm.named_parameters())
    head = {f"value_head.{name}": p for name, p in policy.value_head.named_parameters()}
    ours_grad = gradients(ours, names | head)
    theirs_grad = gradients(theirs, {name: plain_names[name] for name in names} | head)
    for name, grad in theirs_grad.items():
        atol = 1e-5 * max(grad.abs().max().item(), 1e-6)
        assert_close(ours_grad[name], grad, rtol=0, atol=atol, msg=lambda m, n=name: f"gradient of {n}: {m}")


CASES = {
    "one answer": [answer([1, 2, 3], [4, 5, 6])],
    "one-token answers": [answer([1, 2, 3], [4]), answer([1, 2, 3], [5], number=1), answer([9], [1], group="1")],
    "several turns": [
        episode([[([1, 2], False), ([3, 4], True), ([5, 6, 7], False), ([8], True)]], [0.0, 1.0]),
        episode([[([1, 2], False), ([9], True), ([7], False), ([8, 9], True), ([3], False)]], [0.0, 1.0], number=1),
    ],
    "several streams": [
        episode([[([1, 2], False), ([3], True)], [([4, 5], False), ([6, 7], True)]], [0.0, 1.0]),
        episode([[([1, 2], False), ([3], True)], [([4, 5], False), ([8], True)]], [0.0, 1.0], number=1),
    ],
    "bootstraps": [answer([1, 2], [3, 4], truncated=True), answer([1, 2], [5], truncated=True, number=1)],
    "one much longer": [answer([1], [2]), answer([1], list(range(100)), number=1)],
}


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_plain(name, tiny_fp32):
    check_equal_to_plain(make_policy(tiny_fp32), CASES[name])


@pytest.mark.parametrize("joined", [1024, 12, 0], ids=["one call", "some calls", "one a segment"])
@pytest.mark.parametrize("seed", range(3))
def test_packed_equals_plain_at_random_whatever_the_attention(seed, joined, tiny_fp32, monkeypatch):
    monkeypatch.setattr(attention, "JOINED_ROWS", joined)
    check_equal_to_plain(make_policy(tiny_fp32), random_episodes(seed), temperature=0.7)


@pytest.mark.parametrize("on_length", ["zero", "bootstrap", "mask"])
def test_packed_equals_plain_whatever_the_length_rule(on_length, tiny_fp32):
    check_equal_to_plain(make_policy(tiny_fp32), random_episodes(11, groups=4), on_length=on_length)


def test_packed_equals_plain_with_a_head_of_its_own(tmp_path):
    folder = write_tiny_model(tmp_path, tied=False, dtype="float32")
    check_equal_to_plain(make_policy(str(folder)), random_episodes(4))


def test_packed_equals_plain_without_shared_heads(tmp_path):
    folder = write_tiny_model(tmp_path, dtype="float32", num_key_value_heads=4)
    check_equal_to_plain(make_policy(str(folder)), random_episodes(4))


@pytest.mark.parametrize("joined", [1024, 0], ids=["one call", "one a segment"])
def test_bfloat16_is_near(joined, tiny_bf16, monkeypatch):
    monkeypatch.setattr(attention, "JOINED_ROWS", joined)
    policy = make_policy(tiny_bf16, "bfloat16")
    trajectories = random_episodes(2)
    ours, (theirs, _) = policy(collate(trajectories)), plain(policy, trajectories, 1.0, "zero")
    assert ours.logprobs_N.dtype == torch.float32
    assert (ours.logprobs_N - theirs.logprobs_N).abs().mean() < 0.02
    assert (ours.values_N - theirs.values_N).abs().mean() < 0.02


def test_no_mask_grows_with_the_square_of_a_batch(monkeypatch):
    monkeypatch.setattr(attention, "JOINED_ROWS", 5)
    batch = collate([answer([1, 2, 3], [10 + n, 30 + n, 6], number=n) for n in range(10)])
    packing = attention.packing_of(batch, torch.float32, torch.device("cpu"))
    pieces = packing.pieces
    assert packing.parts == (3, 20)
    assert [piece.length for piece in pieces] == [5] + [4] * 4 + [2]
    assert [piece.above for piece in pieces] == [()] + [(0,)] * 5
    assert max(piece.mask_LK.numel() for piece in pieces if piece.mask_LK is not None) == 4 * (3 + 4)


def test_a_single_sequence_needs_no_mask_however_it_was_cut(monkeypatch):
    monkeypatch.setattr(attention, "JOINED_ROWS", 0)
    batch = collate([answer([1, 2], [3, 4, 5]), answer([1, 2], [3, 9], number=1)]).select(np.array([0]))
    assert batch.segment_length_S.tolist() == [3, 1]
    (piece,) = attention.packing_of(batch, torch.float32, torch.device("cpu")).pieces
    assert (piece.length, piece.mask_LK) == (4, None)


def test_selecting_changes_no_number(tiny_fp32):
    policy, batch = make_policy(tiny_fp32), collate(random_episodes(6))
    whole = policy(batch)
    for part in batch.microbatches(20):
        outputs = policy(batch.select(part))
        trained = torch.from_numpy(batch.trained_of(part))
        assert_close(outputs.logprobs_N, whole.logprobs_N[trained], **CLOSE)
        assert_close(outputs.values_N, whole.values_N[trained], **CLOSE)
        assert_close(outputs.bootstrap_E, whole.bootstrap_E[part], **CLOSE)


def test_score_values_are_the_forward_pass_without_the_head(tiny_fp32):
    policy, batch = make_policy(tiny_fp32), collate(random_episodes(7), "bootstrap")
    assert (batch.bootstrap_row_E != NO_ROW).any()
    outputs, (values_N, bootstrap_E) = policy(batch), policy.score_values(batch)
    assert torch.equal(values_N, outputs.values_N)
    assert torch.equal(bootstrap_E, outputs.bootstrap_E)
    assert not bootstrap_E.requires_grad


def test_a_separate_critic_sees_through_a_trunk_of_its_own(tiny_fp32):
    policy, batch = make_policy(tiny_fp32, critic="separate"), collate(random_episodes(7), "bootstrap")
    shared = make_policy(tiny_fp32)(batch)
    ours = policy(batch)
    assert_close(ours.values_N, shared.values_N)  # It starts from the same weights ...
    assert_close(ours.bootstrap_E, shared.bootstrap_E)
    assert_close(ours.logprobs_N, shared.logprobs_N)
    assert torch.equal(policy.score_values(batch)[0], ours.values_N)
    ours.values_N.square().sum().backward()  # ... and what it learns leaves the policy alone, and the other way round.
    assert all(p.grad is None for p in policy.lm.parameters())
    assert all(p.grad is not None for p in policy.value_trunk.parameters())
    policy.zero_grad()
    policy(batch).logprobs_N.sum().backward()
    assert all(p.grad is None for p in policy.value_trunk.parameters())
    assert not any("value" in name for name, _ in policy.published())


class KeptBytes(saved_tensors_hooks):
    """How much a forward pass keeps for its backward pass."""

    def __init__(self) -> None:
        self.total = 0
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.total += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_activation_checkpointing_changes_nothing_but_what_is_kept(critic, tiny_fp32):
    batch, kept, grads = collate(random_episodes(3, groups=6)), [], []
    for checkpointing in (False, True):
        policy = Policy(PolicySettings(tiny_fp32, "float32", critic, activation_checkpointing=checkpointing))
        bytes_kept = KeptBytes()
        with bytes_kept:
            outputs = policy(batch)
            loss = outputs.logprobs_N.sum() + outputs.entropy_N.sum() + (outputs.values_N - 1).square().sum()
        kept.append(bytes_kept.total)
        loss.backward()
        grads.append({name: p.grad for name, p in policy.named_parameters()})
    assert kept[1] < 0.4 * kept[0]
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_naive_head_says_the_same(tiny_fp32):
    batch = collate(random_episodes(3))
    ours = make_policy(tiny_fp32)
    naive = Policy(PolicySettings(tiny_fp32, "float32", head="naive"))
    for name in ("logprobs_N", "entropy_N", "normalizers_N"):
        assert_close(getattr(naive(batch, 0.7), name), getattr(ours(batch, 0.7), name), **CLOSE)


def test_without_trunk_gradient_only_the_value_head_learns(tiny_fp32):
    policy, batch = make_policy(tiny_fp32), collate(random_episodes(8))
    outputs = policy(batch, trunk_gradient=False)
    (outputs.values_N.square().sum() + outputs.logprobs_N.sum()).backward()
    assert all(p.grad is None for p in policy.lm.parameters())
    assert policy.value_head.weight.grad.abs().sum() > 0


def test_values_start_at_zero_and_are_zero_without_a_critic(tiny_fp32):
    batch = collate(random_episodes(8))
    fresh = Policy(PolicySettings(tiny_fp32, dtype="float32"))
    assert fresh(batch).values_N.abs().max() == 0
    none = make_policy(tiny_fp32, critic="none")
    assert not none.has_values
    assert none(batch).values_N.abs().max() == 0
    assert none(batch).bootstrap_E.abs().max() == 0


def test_score_rows_equals_plain(tiny_fp32):
    policy = make_policy(tiny_fp32)
    rows = torch.arange(120).view(3, 40) * 5 % 250
    ours = policy.score_rows(rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_fp32, dtype=torch.float32)
    logs = torch.log_softmax(model(input_ids=rows).logits[:, :-1], -1)
    assert_close(ours, logs.gather(-1, rows[:, 1:, None]).squeeze(-1), **CLOSE)
    assert not ours.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_published_is_what_hugging_face_saves(tied, tmp_path):
    folder = write_tiny_model(tmp_path, tied=tied)
    policy = make_policy(str(folder), "bfloat16")
    published = dict(policy.published())
    names = set(load_file(folder / "model.safetensors"))
    assert set(published) == names
    assert ("lm_head.weight" in published) is not tied
    assert all(t.dtype == torch.bfloat16 and not t.requires_grad for t in published.values())
    assert not any("value_head" in name for name in published)


@pytest.mark.parametrize("change", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_models_that_change_their_logits_are_refused(change, tmp_path):
    folder = write_tiny_model(tmp_path, **{change: 8.0})
    with pytest.raises(ValueError, match=change):
        Policy(PolicySettings(str(folder)))


@pytest.mark.parametrize("change", [{"sliding_window": 16}, {"attn_logit_softcapping": 30.0}])
def test_models_whose_attention_is_not_plain_are_refused(change, tmp_path):
    folder = write_tiny_model(tmp_path, **change)
    with pytest.raises(ValueError, match="plain causal attention"):
        Policy(PolicySettings(str(folder)))


def test_read_only_columns_are_enough(tiny_fp32):
    """Columns from other machines may be read-only; the policy never writes to them."""
    policy, batch = make_policy(tiny_fp32), collate(random_episodes(9))
    for field in dataclasses.fields(batch):
        column = getattr(batch, field.name)
        if isinstance(column, np.ndarray):
            column.setflags(write=False)
    assert policy(batch).logprobs_N.isfinite().all()


def test_only_safetensors_are_read(tmp_path):
    folder = write_tiny_model(tmp_path)
    (Path(folder) / "model.safetensors").rename(Path(folder) / "pytorch_model.bin")
    with pytest.raises(OSError):
        Policy(PolicySettings(str(folder)))
