"""A learner saved and loaded goes on as if nothing had happened."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollcast_learners import state
from rollcast_learners.batch import Batch, collate
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import KLSettings, LearnerSettings
from tiny_model import write_tiny_model
from trajectories import random_episodes

FILES = {"policy.safetensors", "critic.safetensors", "optimizer.safetensors", "learner.json"}


def make_learner(folder: str, dtype: str = "float32", **settings: Any) -> PolicyLearner:
    defaults = {"learning_rate": 1e-3, "minibatches": 2, "epochs": 2, "lr_schedule": "linear", "weight_decay": 0.1}
    learner_settings = LearnerSettings(**(defaults | settings))
    policy = Policy(PolicySettings(folder, dtype=dtype, critic=learner_settings.critic))
    return PolicyLearner(policy, learner_settings, KLSettings(), temperature=0.8, total_steps=20, seed=5)


def batches(count: int) -> list[Batch]:
    return [collate(random_episodes(seed, groups=3, samples=3)) for seed in range(count)]


def everything(learner: PolicyLearner) -> dict[str, Tensor]:
    """Policy, masters and moments."""
    optimizer = learner.optimizer
    tensors = {f"policy/{name}": p.detach() for name, p in learner.policy.named_parameters()}
    for name, master in zip(optimizer.names, optimizer.masters, strict=True):
        tensors[f"master/{name}"] = master.detach()
        tensors |= {f"{key}/{name}": value for key, value in optimizer.adamw.state[master].items()}
    return tensors


def assert_same_bits(left: PolicyLearner, right: PolicyLearner) -> None:
    ours, theirs = everything(left), everything(right)
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different


@pytest.fixture(params=["float32", "bfloat16"])
def make(request, tiny_fp32, tiny_bf16) -> Callable[..., PolicyLearner]:
    folder = {"float32": tiny_fp32, "bfloat16": tiny_bf16}[request.param]
    return lambda **settings: make_learner(folder, request.param, **settings)


@pytest.mark.parametrize("critic", ["head", "none"])
def test_the_step_after_a_resume_is_that_of_an_uninterrupted_run(critic, make, tmp_path):
    first, *rest = batches(4)
    straight, resumed = make(critic=critic), make(critic=critic)
    straight.step(first)
    state.save(straight, tmp_path)
    state.load(resumed, tmp_path)
    assert_same_bits(straight, resumed)
    for batch in rest:
        assert straight.step(batch) == resumed.step(batch)
        assert_same_bits(straight, resumed)


def test_a_save_changes_nothing(make, tmp_path):
    saved, plain = make(), make()
    for number, batch in enumerate(batches(2)):
        saved.step(batch)
        plain.step(batch)
        (tmp_path / str(number)).mkdir()
        state.save(saved, tmp_path / str(number))
    assert_same_bits(saved, plain)


def test_a_learner_that_went_astray_can_be_put_back(make, tmp_path):
    """Going back to a checkpoint in a live process, also to one from before the first step."""
    learner, twin = make(), make()
    state.save(learner, tmp_path)
    first, second = batches(2)
    learner.step(first)
    state.load(learner, tmp_path)
    learner.step(second)
    twin.step(second)
    assert_same_bits(learner, twin)


def test_resume_in_the_middle_of_critic_warm_up(make, tmp_path):
    straight, resumed = make(critic_warmup_steps=2), make(critic_warmup_steps=2)
    first, *rest = batches(4)
    straight.step(first)
    state.save(straight, tmp_path)
    state.load(resumed, tmp_path)
    for batch in rest:
        straight.step(batch)
        resumed.step(batch)
    assert_same_bits(straight, resumed)


def test_the_guard_and_the_rate_are_remembered(make, tmp_path):
    learner, resumed = make(), make()
    (batch,) = batches(1)
    batch.rewards_N[0] = float("nan")
    learner.step(batch)
    learner.step(batch)
    state.save(learner, tmp_path)
    state.load(resumed, tmp_path)
    assert resumed.guard.state() == learner.guard.state()
    assert (resumed.guard.skipped, resumed.rate_scale, resumed.steps_done) == (8, 0.5, 2)
    assert resumed.step(batch).diverged is not None


def test_files_hold_no_pickle(make, tmp_path):
    learner = make()
    learner.step(batches(1)[0])
    state.save(learner, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    json.loads((tmp_path / "learner.json").read_text(encoding="utf-8"))
    for path in tmp_path.glob("*.safetensors"):
        assert all(tensor.dtype == torch.float32 for tensor in load_file(path).values())
        assert b"pickle" not in path.read_bytes()[:4096]


def test_the_policy_file_has_hugging_face_names(make, tmp_path):
    learner = make()
    state.save(learner, tmp_path)
    assert set(load_file(tmp_path / "policy.safetensors")) == set(dict(learner.policy.lm.named_parameters()))


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"hidden_size": 32, "head_dim": 16}, "embed_tokens"),
        ({"intermediate_size": 96}, "mlp"),
        ({"num_hidden_layers": 3}, r"layers\.2"),
        ({"num_hidden_layers": 1}, r"layers\.1"),
        ({"tied": False}, "lm_head"),
    ],
)
def test_another_model_is_refused_by_the_name_of_a_tensor(overrides, named, tiny_fp32, tmp_path):
    folder = write_tiny_model(tmp_path / "other", dtype="float32", **overrides)
    (tmp_path / "state").mkdir()
    state.save(make_learner(tiny_fp32), tmp_path / "state")
    other = make_learner(str(folder))
    before = {name: p.clone() for name, p in other.policy.named_parameters()}
    with pytest.raises(ValueError, match=named):
        state.load(other, tmp_path / "state")
    assert all(torch.equal(before[name], p) for name, p in other.policy.named_parameters())


def test_a_state_without_a_moment_is_refused(tiny_fp32, tmp_path):
    learner = make_learner(tiny_fp32)
    learner.step(batches(1)[0])
    state.save(learner, tmp_path)
    moments = load_file(tmp_path / "optimizer.safetensors")
    del moments["exp_avg_sq/lm.model.norm.weight"]
    save_file(moments, tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"exp_avg_sq/lm\.model\.norm\.weight"):
        state.load(make_learner(tiny_fp32), tmp_path)
