"""A policy shared out among two learners learns what one learner does, with half of its memory in each."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from learner_groups import assert_equal, batch_of, one_group, published
from rollcast_learners import sharding, state
from rollcast_learners.batch import Batch, collate
from rollcast_learners.learner import PolicyLearner, StepResult, one_learner
from rollcast_learners.optimizer import MasterAdamW, Reduce
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.rllib import Learners, LearnerSpec, LMLearner, _publish
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings, LoraSettings
from rollcast_learners.supervised import SupervisedLearner
from tiny_model import write_tiny_model
from trajectories import random_episodes

# What learner processes are asked to run below is sent as code: they cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::UserWarning:ray.*")]

NAN = float("nan")
LORA = LoraSettings(rank=4, alpha=8)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "minibatches": {"minibatches": 2},
    "epochs and micro-batches": {"epochs": 2, "minibatches": 3, "microbatch_tokens": 25},
    "group": {"critic": "none", "normalize_advantages": "group"},
    "all terms": {"entropy_coef": 0.01, "value_clip": 0.1, "reward_clip": 0.5, "critic_warmup_steps": 1},
    "kl": {"kl": KLSettings(kind="k3", coef=0.1, applied_as="loss")},
    "rloo, corrected": {"algorithm": "rloo", "correction": "sequence_tis", "microbatch_tokens": 40},
    "gspo, answers": {"algorithm": "gspo", "minibatches": 2},
    "soft q": {"algorithm": "soft_q", "kl": KLSettings(kind="k1", coef=0.1)},
    "separate critic": {"critic": "separate", "epochs": 2},
    "checkpointed": {"checkpointing": True, "microbatch_tokens": 25},
    "compiled": {"compiled": True, "microbatch_tokens": 25},
    "adapter": {"adapter": LORA, "kl": KLSettings(kind="k3", coef=0.1)},
    "adapter, merged": {"adapter": LORA.model_copy(update={"publish": "merged"}), "epochs": 2},
    "adapter of one row, which one learner has": {"adapter": LORA.model_copy(update={"rank": 1})},
    "supervised": {"supervised": True, "microbatch_tokens": 40},
}


def make_spec(
    folder: str,
    dtype: str = "float32",
    kl: KLSettings | None = None,
    correction: str = "none",
    adapter: LoraSettings | None = None,
    checkpointing: bool = False,
    compiled: bool = False,
    supervised: bool = False,
    **settings: Any,
) -> LearnerSpec:
    learner = LearnerSettings(**{"num_learners": 2, "sharding": "fsdp", "grad_clip": 10.0} | settings)
    made = {"activation_checkpointing": checkpointing, "compile": compiled, "adapter": adapter}
    policy = PolicySettings(folder, dtype, learner.critic, **made)
    others = kl or KLSettings(), CorrectionSettings(correction=correction)
    run = {"temperature": 0.9, "total_steps": 20, "answer_tokens": 6, "seed": 3, "supervised": supervised}
    return LearnerSpec(policy, learner, *others, **run)


def one_large_group(seed: int) -> Batch:
    """One learner has several micro-batches where the other has one."""
    return collate(random_episodes(seed, groups=1, samples=9) + random_episodes(seed + 50, groups=1, samples=1))


def make_learner(spec: LearnerSpec, sharded: bool, reduce: Reduce = one_learner) -> PolicyLearner:
    """The learner without RLlib; on all ranks of a group, or alone."""
    policy = Policy(spec.policy)
    reference = None
    if spec.kl.kind != "none":
        adapted = spec.policy.adapter is not None
        reference = policy.without_adapter() if adapted else Policy(spec.policy).requires_grad_(False)
    for part in (policy, reference):
        if sharded and isinstance(part, Policy):
            part.shard(torch.device("cpu"))
    fixed = spec.learner, spec.kl, spec.correction
    run = {"total_steps": spec.total_steps, "answer_tokens": spec.answer_tokens, "seed": spec.seed}
    kind = SupervisedLearner if spec.supervised else PolicyLearner
    return kind(policy, *fixed, temperature=spec.temperature, reference=reference, reduce=reduce, **run)


def start_again(learner: LMLearner, spec: LearnerSpec) -> None:
    """A fresh learner with other settings in the process there is: starting one takes 15 seconds."""
    learner.core = make_learner(spec, spec.learner.sharding == "fsdp", learner._sum_over_learners)
    learner.specs = ()
    if learner.arena is not None:
        learner.arena.close()
        learner.arena = None


def whole_weights(learner: LMLearner) -> dict[str, np.ndarray]:
    """Every trained weight in float32, gathered."""
    optimizer = learner.core.optimizer
    parts = zip(optimizer.names, optimizer.parameters, optimizer.masters, strict=True)
    return {name: sharding.whole(weight, master).numpy().copy() for name, weight, master in parts}


def whole_gradients(learner: LMLearner) -> dict[str, np.ndarray]:
    optimizer = learner.core.optimizer
    parts = zip(optimizer.names, optimizer.parameters, optimizer.grads, strict=True)
    return {name: sharding.whole(weight, grad).numpy().copy() for name, weight, grad in parts}


def rows_and_moments(learner: LMLearner) -> dict[str, np.ndarray]:
    """All that this rank alone has."""
    optimizer = learner.core.optimizer
    tensors = {name: m.numpy().copy() for name, m in zip(optimizer.names, optimizer.masters, strict=True)}
    for name, master in zip(optimizer.names, optimizer.masters, strict=True):
        tensors |= {f"{key}/{name}": v.numpy().copy() for key, v in optimizer.adamw.state[master].items()}
    return tensors


def optimizer_bytes(optimizer: MasterAdamW) -> int:
    moments = [v for s in optimizer.adamw.state.values() for k, v in s.items() if k != "step"]
    return sum(tensor.nbytes for tensor in (*optimizer.masters, *moments, optimizer.flat))


def policy_bytes(policy: Policy) -> int:
    return sum(sharding.local(p).nbytes for p in policy.parameters())


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float, name: str, smallest: float = 1e-3) -> None:
    """Up to a share of the largest entry; of a weight that was zero before it was moved, a share of 1e-3."""
    largest = max(float(np.abs(theirs).max()), smallest)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest, err_msg=name)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def pair(ray_cluster, tiny_fp32):
    """Two learners with one policy between them, joined by gloo."""
    learners = Learners(make_spec(tiny_fp32))
    yield learners
    learners.close()


def test_the_group_builds_a_sharded_policy(pair, tiny_fp32):
    """As RLlib builds it, and not as `start_again` does."""
    twin = make_learner(make_spec(tiny_fp32), sharded=False)
    assert pair._each(lambda learner: sharding.is_sharded(learner.core.policy)) == [True, True]
    assert pair._each(lambda _: torch.distributed.get_rank()) == [0, 1], "the first learner is the one that writes"
    assert_equal(pair.step(batch_of(0)), twin.step(batch_of(0)))
    tokens = np.random.default_rng(0).integers(0, 250, (3, 12)).astype(np.int32)
    expected = twin.policy.score_rows(torch.from_numpy(tokens.astype(np.int64))).numpy()
    np.testing.assert_allclose(pair.probe(tokens).logprobs_RL, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # See test_compiled.py.
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.soak if name == "compiled" else ()) for name in VARIANTS]
)
def test_two_sharded_learners_equal_one_that_is_whole(variant, pair, tiny_fp32, tmp_path):
    spec = make_spec(tiny_fp32, **VARIANTS[variant])
    pair._each(start_again, spec=spec)
    twin = make_learner(spec, sharded=False)
    for seed, make in enumerate([batch_of, one_group, one_large_group, batch_of]):
        batch = make(seed)
        assert_equal(pair.step(batch), twin.step(batch))
        left, right = pair._each(whole_gradients)
        assert same(left, right)
        for name, grad in zip(twin.optimizer.names, twin.optimizer.grads, strict=True):
            assert_close(left[name], grad.numpy(), 2e-5, name, smallest=1e-6)
    left, right = pair._each(whole_weights)
    assert same(left, right)
    for name, master in zip(twin.optimizer.names, twin.optimizer.masters, strict=True):
        assert_close(left[name], master.detach().numpy(), 1e-5, name)
    sent = published(pair, tmp_path / "weights", 1)
    expected = dict(twin.policy.published())
    assert sent.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(sent[name].numpy(), tensor.detach().numpy(), 1e-5, name)


def test_weights_whose_rows_do_not_come_out_even(pair, tmp_path):
    """Of 129 rows the first learner has 65, and FSDP2 keeps the second one's 64 in a place for 65."""
    spec = make_spec(str(write_tiny_model(tmp_path / "odd", dtype="float32", intermediate_size=129)), epochs=2)
    pair._each(start_again, spec=spec)
    twin = make_learner(spec, sharded=False)
    assert_equal(pair.step(batch_of(0)), twin.step(batch_of(0)))
    (tmp_path / "state").mkdir()
    pair.save(tmp_path / "state")
    pair._each(start_again, spec=spec)
    pair.load(tmp_path / "state")
    assert_equal(pair.step(batch_of(1)), twin.step(batch_of(1)))
    left, right = pair._each(whole_weights)
    assert same(left, right)
    for name, master in zip(twin.optimizer.names, twin.optimizer.masters, strict=True):
        assert_close(left[name], master.detach().numpy(), 1e-5, name)


def test_the_held_out_loss_of_a_sharded_policy(pair, tiny_fp32):
    spec = make_spec(tiny_fp32, supervised=True, microbatch_tokens=40)
    pair._each(start_again, spec=spec)
    twin = make_learner(spec, sharded=False)
    assert pair.held_out_loss(batch_of(2)) == pytest.approx(twin.held_out_loss(batch_of(2)), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_learner_has_half_of_the_memory(dtype, pair, request):
    folder = request.getfixturevalue({"float32": "tiny_fp32", "bfloat16": "tiny_bf16"}[dtype])
    spec = make_spec(folder, dtype, kl=KLSettings(kind="k3", coef=0.1))
    pair._each(start_again, spec=spec)
    twin = make_learner(spec, sharded=False)
    pair.step(batch_of(0))
    twin.step(batch_of(0))
    shares = pair._each(lambda learner: optimizer_bytes(learner.core.optimizer))
    assert max(shares) < 0.55 * optimizer_bytes(twin.optimizer)
    # Nothing else is kept: the float32 rows are the policy's own, and the reference has its rows in its own dtype.
    own = sum(m.nbytes for m in twin.optimizer.masters)
    assert max(pair._each(lambda learner: policy_bytes(learner.core.policy))) < 0.55 * own
    whole = policy_bytes(twin.scorer.reference)
    assert max(pair._each(lambda learner: policy_bytes(learner.core.reference))) < 0.55 * whole


def test_a_checkpoint_is_the_same_however_it_is_written(pair, tiny_bf16, tmp_path):
    """Bit by bit: sharded, then whole, then sharded again; and the run goes on the same."""
    spec = make_spec(tiny_bf16, "bfloat16", epochs=2)
    pair._each(start_again, spec=spec)
    pair.step(batch_of(0))
    folders = [tmp_path / name for name in ("sharded", "whole", "again")]
    for folder in folders:
        folder.mkdir()
    pair.save(folders[0])
    twin = make_learner(spec, sharded=False)
    state.load(twin, folders[0])
    state.save(twin, folders[1])
    expected = pair.step(batch_of(1))
    assert_close_results(twin.step(batch_of(1)), expected)
    pair._each(start_again, spec=spec)
    pair.load(folders[1])
    pair.save(folders[2])
    for file in ("policy.safetensors", "critic.safetensors", "optimizer.safetensors", "learner.json"):
        first, second, third = ((folder / file).read_bytes() for folder in folders)
        assert first == second == third, file
    assert pair.step(batch_of(1)) == expected
    assert json.loads((folders[0] / "learner.json").read_text())["steps_done"] == 1


def assert_close_results(result: StepResult, other: StepResult) -> None:
    """In bfloat16 the order of sums shows in the second digit."""
    for name in ("loss/policy", "loss/value", "grad_norm"):
        assert result.metrics[name] == pytest.approx(other.metrics[name], rel=0.05, abs=0.01), name


def test_a_state_from_before_the_first_step_is_loaded_too(pair, tiny_fp32, tmp_path):
    spec = make_spec(tiny_fp32)
    pair._each(start_again, spec=spec)
    pair.save(tmp_path)
    expected = pair.step(batch_of(3))
    pair.load(tmp_path)
    assert pair.step(batch_of(3)) == expected


def test_what_is_published_is_what_a_whole_learner_publishes(pair, tiny_bf16, tmp_path):
    """Byte by byte, of the same masters."""
    spec = make_spec(tiny_bf16, "bfloat16")
    pair._each(start_again, spec=spec)
    pair.step(batch_of(0))
    (tmp_path / "state").mkdir()
    pair.save(tmp_path / "state")
    twin = make_learner(spec, sharded=False)
    state.load(twin, tmp_path / "state")
    expected = dict(twin.policy.published())
    for version in (1, 2):
        sent = published(pair, tmp_path / "weights", version)
        assert sent.keys() == expected.keys()
        assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())


def failing(learner: LMLearner, folder: str) -> list[str]:
    """What cannot be written, told here: RLlib calls no learner again that raised."""
    told = []
    try:
        _publish(learner, 1, folder, [], True)
    except ValueError as error:
        told.append(str(error)[:9])
    try:
        state.save(learner.core, Path(folder) / "missing")
    except OSError as error:
        told.append(type(error).__name__)
    return told


def test_what_the_first_cannot_write_leaves_the_learners_in_step(pair, tiny_fp32, tmp_path):
    pair._each(start_again, spec=make_spec(tiny_fp32))
    published(pair, tmp_path / "weights", 1)
    told = pair._each(failing, folder=str(tmp_path / "weights"))
    assert told == [["Version 1", "FileNotFoundError"], []]
    published(pair, tmp_path / "weights", 2)
    assert pair.step(batch_of(1)).diverged is None


def spoil(learner: LMLearner) -> None:
    """The second learner's share of a gradient becomes NaN, before it is summed."""
    if torch.distributed.get_rank() == 1:
        layer = learner.core.policy.lm.model.layers[0].mlp.up_proj
        learner.hook = layer.register_full_backward_hook(lambda _, gradients, __: tuple(g * NAN for g in gradients))


def heal(learner: LMLearner) -> None:
    if hasattr(learner, "hook"):
        learner.hook.remove()
        del learner.hook


@pytest.mark.parametrize("where", ["rewards_N", "old_logprobs_N", "gradient"])
def test_a_bad_number_on_one_learner_is_skipped_on_both(where, pair, tiny_fp32):
    settings = {"normalize_advantages": "none", "microbatch_tokens": 60}
    pair._each(start_again, spec=make_spec(tiny_fp32, **settings))
    batch = batch_of(7)
    pair.step(batch)
    before = pair._each(rows_and_moments)
    if where == "gradient":
        pair._each(spoil)
    else:
        column = getattr(batch, where).copy()
        column[0] = NAN
        batch = dataclasses.replace(batch, **{where: column})
    result = pair.step(batch)
    pair._each(heal)
    assert result.metrics["guard/skipped_steps"] == 1
    assert pair._each(lambda learner: learner.core.guard.skipped) == [1, 1]
    assert all(same(old, new) for old, new in zip(before, pair._each(rows_and_moments), strict=True))
    after = pair.step(batch_of(8))
    assert after.metrics["guard/skipped_steps"] == 1 and after.metrics["grad_norm"] > 0
    assert not any(same(old, new) for old, new in zip(before, pair._each(rows_and_moments), strict=True))


def test_a_learner_on_its_own_is_refused(tiny_fp32):
    with pytest.raises(ValueError, match="num_learners"):
        Policy(PolicySettings(tiny_fp32, "float32")).shard(torch.device("cpu"))
