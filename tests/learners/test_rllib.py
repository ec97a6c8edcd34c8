"""RLlib's learner group around the learner: two learners equal one, and each of RLlib's traps stays shut."""

import dataclasses
import os
import sys
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from ray.rllib.core import DEFAULT_MODULE_ID

from learner_groups import assert_equal, batch_of, one_group, published
from rollcast_learners.batch import collate, nbytes
from rollcast_learners.errors import LearnerLost
from rollcast_learners.learner import PolicyLearner, one_learner
from rollcast_learners.optimizer import Reduce
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.rllib import (
    PACKED,
    Learners,
    LearnerSpec,
    LMLearner,
    LMModule,
    _take_result,
    opaque,
    wrap,
)
from rollcast_learners.segments import NonFiniteWeights
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from trajectories import answer

# What learner processes are asked to run below is sent as code: they cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:ray.*")

NAN = float("nan")


def make_spec(
    folder: str, dtype: str = "float32", kl: KLSettings | None = None, correction: str = "none", **settings: Any
) -> LearnerSpec:
    learner = LearnerSettings(**{"num_learners": 0, "grad_clip": 10.0} | settings)
    policy = PolicySettings(folder, dtype, learner.critic)
    others = kl or KLSettings(), CorrectionSettings(correction=correction)
    return LearnerSpec(policy, learner, *others, temperature=0.9, total_steps=20, answer_tokens=6, seed=3)


def alone(spec: LearnerSpec, reduce: Reduce = one_learner) -> PolicyLearner:
    """The same learner without RLlib."""
    reference = Policy(spec.policy).requires_grad_(False) if spec.kl.kind != "none" else None
    return PolicyLearner(
        Policy(spec.policy),
        spec.learner,
        spec.kl,
        spec.correction,
        temperature=spec.temperature,
        total_steps=spec.total_steps,
        answer_tokens=spec.answer_tokens,
        seed=spec.seed,
        reference=reference,
        reduce=reduce,
    )


def start_again(learner: LMLearner, spec: LearnerSpec) -> None:
    """A fresh learner with other settings in the process there is: starting one takes 15 seconds."""
    learner.core = alone(spec, learner._sum_over_learners)
    if learner.arena is not None:
        learner.arena.close()
        learner.arena = None


def tensors_of(learner: LMLearner) -> dict[str, np.ndarray]:
    tensors = {name: p.detach().float().numpy() for name, p in learner.core.policy.named_parameters()}
    return tensors | {f"master/{i}": m.detach().numpy() for i, m in enumerate(learner.core.optimizer.masters)}


def gradients_of(learner: LMLearner) -> list[np.ndarray]:
    return [grad.numpy() for grad in learner.core.optimizer.grads]


@pytest.fixture
def local(tiny_fp32, tmp_path):
    """Makes learners in this process, and closes them."""
    made: list[Learners] = []

    def make(dtype: str = "float32", folder: str = tiny_fp32, **settings: Any) -> Learners:
        made.append(Learners(make_spec(folder, dtype, **settings)))
        return made[-1]

    yield make
    for learners in made:
        learners.close()


@pytest.fixture(scope="module")
def pair(ray_cluster, tiny_fp32):
    """Two learners in processes of their own, joined by gloo."""
    learners = Learners(make_spec(tiny_fp32, num_learners=2))
    yield learners
    learners.close()


# In this process.


@pytest.mark.parametrize(
    "settings", [{}, {"epochs": 2, "minibatches": 3, "microbatch_tokens": 30}], ids=["one", "many"]
)
def test_rllib_changes_no_number(settings, local, tiny_fp32):
    """Ragged columns arrive whole: RLlib's own iterators would cut all of them at the shortest."""
    learners, twin = local(**settings), alone(make_spec(tiny_fp32, **settings))
    for seed in range(2):
        assert learners.step(batch_of(seed)) == twin.step(batch_of(seed))
    (mine,) = learners._each(tensors_of)
    for name, p in twin.policy.named_parameters():
        assert np.array_equal(mine[name], p.detach().numpy())


def test_a_learner_uses_the_threads_it_is_given(local):
    (learner,) = local(threads=2)._each(lambda learner: learner)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)  # As the other tests have it.
    assert learner.core.settings.threads == 2


def test_a_packed_batch_passes_through_rllibs_clothes_whole():
    batch = batch_of(0)
    assert len({len(batch.tokens_T), len(batch.target_N), len(batch.episode_length_E)}) == 3
    clothed = wrap(batch)
    assert opaque(clothed[DEFAULT_MODULE_ID]) is batch
    assert clothed.env_steps() == batch.trained_tokens
    assert clothed[DEFAULT_MODULE_ID][PACKED].dtype == object
    copied = cloudpickle.loads(cloudpickle.dumps(clothed))
    assert nbytes(opaque(copied[DEFAULT_MODULE_ID])) == nbytes(batch)


def test_rllib_has_neither_optimizer_nor_wrapper_of_its_own(local):
    learners = local()
    learner = learners.group._learner
    assert type(learner.module[DEFAULT_MODULE_ID]) is LMModule
    assert learner._named_optimizers == {}


def test_the_module_answers_by_rllibs_names(local):
    learners, batch = local(), batch_of(1)
    module = learners.group._learner.module[DEFAULT_MODULE_ID]
    inside = wrap(batch)[DEFAULT_MODULE_ID]
    outputs = module._forward(inside)
    assert outputs["logprobs_N"].shape == (len(batch.target_N),)
    assert torch.equal(module.compute_values(inside), outputs["values_N"])


def test_nan_is_not_stepped(local):
    """RLlib's `torch_skip_nan_gradients` would make every weight NaN."""
    learners, batch = local(), batch_of(2)
    learners.step(batch)
    (before,) = learners._each(tensors_of)
    batch.rewards_N[0] = NAN
    result = learners.step(batch)
    (after,) = learners._each(tensors_of)
    assert result.metrics["guard/skipped_steps"] == 1
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_bfloat16_publishes_what_it_holds(local, tiny_bf16, tmp_path):
    """RLlib's `get_weights` raises on bfloat16."""
    learners = local("bfloat16", tiny_bf16)
    learners.step(batch_of(3))
    sent = published(learners, tmp_path / "weights", 1)
    policy = learners.group._learner.core.policy
    assert sent.keys() == dict(policy.published()).keys()
    for name, tensor in policy.published():
        assert sent[name].dtype == torch.bfloat16
        assert torch.equal(sent[name], tensor)
    learners.step(batch_of(4))
    newer = published(learners, tmp_path / "weights", 2)
    assert not all(torch.equal(sent[name], newer[name]) for name in sent)


def test_the_probe_is_the_policys_opinion(local):
    learners = local()
    tokens = np.random.default_rng(0).integers(0, 250, (3, 12)).astype(np.int32)
    probe = learners.probe(tokens)
    policy = learners.group._learner.core.policy
    same = [policy(collate([answer(row[:1], row[1:])]), 1.0).logprobs_N for row in tokens.tolist()]
    np.testing.assert_allclose(probe.logprobs_RL, torch.stack(same).detach().numpy(), atol=1e-5)


def test_save_and_load_through_the_group(local, tmp_path):
    first, second = local(), local()
    first.step(batch_of(5))
    first.save(tmp_path)
    second.load(tmp_path)
    assert first.step(batch_of(6)) == second.step(batch_of(6))


def test_a_result_is_asked_for_once(local):
    learners = local()
    with pytest.raises(Exception, match="before it had made a step"):
        learners._each(_take_result)


@pytest.mark.ray
def test_the_group_knows_its_node_and_what_it_used(pair):
    assert pair.node() == ray.get_runtime_context().get_node_id()
    assert pair.cpu_seconds() > 0


# Two learners.

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "minibatches": {"minibatches": 2},
    "epochs and micro-batches": {"epochs": 2, "minibatches": 3, "microbatch_tokens": 25},
    "group": {"critic": "none", "normalize_advantages": "group"},
    "all terms": {"entropy_coef": 0.01, "value_clip": 0.1, "reward_clip": 0.5, "critic_warmup_steps": 1},
    "kl": {"kl": KLSettings(kind="k3", coef=0.1, applied_as="loss")},
    "rloo, corrected": {"algorithm": "rloo", "correction": "sequence_tis"},
    "gspo, answers": {"algorithm": "gspo", "minibatches": 2},
    "soft q": {"algorithm": "soft_q", "kl": KLSettings(kind="k1", coef=0.1)},
    "separate critic": {"critic": "separate", "epochs": 2},
}


@pytest.mark.ray
def test_both_learners_run_apart_without_a_wrapper(pair):
    kinds = pair._each(lambda learner: type(learner.module[DEFAULT_MODULE_ID]).__name__)
    assert kinds == ["LMModule", "LMModule"]
    assert len(set(pair._each(lambda _: os.getpid()))) == 2


@pytest.mark.ray
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_learners_equal_one(variant, pair, tiny_fp32, tmp_path):
    spec = make_spec(tiny_fp32, num_learners=2, **VARIANTS[variant])
    pair._each(start_again, spec=spec)
    twin = alone(spec)
    for seed, make in enumerate([batch_of, one_group, batch_of]):
        batch = make(seed)
        assert_equal(pair.step(batch), twin.step(batch))
        for grad, ours in zip(twin.optimizer.grads, pair._first(gradients_of), strict=True):
            largest = max(grad.abs().max().item(), 1e-6)
            np.testing.assert_allclose(ours, grad.numpy(), rtol=0, atol=2e-5 * largest)
    left, right = pair._each(tensors_of)
    assert all(np.array_equal(left[name], right[name]) for name in left), "replicas drifted apart"
    for name, p in twin.policy.named_parameters():
        np.testing.assert_allclose(left[name], p.detach().numpy(), rtol=1e-5, atol=1e-5)
    for name, tensor in published(pair, tmp_path / "weights", 100 + list(VARIANTS).index(variant)).items():
        np.testing.assert_array_equal(tensor.numpy(), left[f"lm.{name}"])


@pytest.mark.ray
def test_bfloat16_replicas_stay_equal(pair, tiny_bf16):
    spec = make_spec(tiny_bf16, "bfloat16", num_learners=2, minibatches=2)
    pair._each(start_again, spec=spec)
    for seed in range(3):
        pair.step(batch_of(seed))
    left, right = pair._each(tensors_of)
    assert all(np.array_equal(left[name], right[name]) for name in left)


def spoil(learner: LMLearner, rank_spoils: bool) -> None:
    if rank_spoils and torch.distributed.get_rank() == 1:
        weight = learner.core.policy.lm.model.layers[0].mlp.up_proj.weight
        learner.hook = weight.register_hook(lambda grad: grad * NAN)


def heal(learner: LMLearner) -> None:
    if hasattr(learner, "hook"):
        learner.hook.remove()


@pytest.mark.ray
@pytest.mark.parametrize("where", ["rewards_N", "old_logprobs_N", "gradient"])
def test_a_bad_number_on_one_learner_is_skipped_on_both(where, pair, tiny_fp32):
    pair._each(start_again, spec=make_spec(tiny_fp32, num_learners=2, normalize_advantages="none"))
    batch = batch_of(7)
    pair.step(batch)
    before = pair._each(tensors_of)
    if where == "gradient":
        pair._each(spoil, rank_spoils=True)
    else:
        column = getattr(batch, where).copy()
        column[0] = NAN
        batch = dataclasses.replace(batch, **{where: column})
    result = pair.step(batch)
    pair._each(heal)
    assert result.metrics["guard/skipped_steps"] == 1
    assert pair._each(lambda learner: learner.core.guard.skipped) == [1, 1]
    for old, new in zip(before, pair._each(tensors_of), strict=True):
        assert all(np.array_equal(old[name], new[name]) for name in old)
    assert pair.step(batch_of(8)).metrics["guard/skipped_steps"] == 1


@pytest.mark.ray
def test_what_a_learner_cannot_publish_is_told_and_costs_no_process(pair, tiny_fp32, tmp_path):
    """RLlib's own `apply` ends the process on any exception."""
    pair._each(start_again, spec=make_spec(tiny_fp32, num_learners=2))
    pair._each(lambda learner: learner.core.policy.lm.model.norm.weight.data.fill_(NAN))
    with pytest.raises(NonFiniteWeights, match=r"^Tensor model.norm.weight holds NaN"):
        published(pair, tmp_path / "weights", 1)
    assert all(psutil.pid_exists(pid) for pid in pair.pids)


@pytest.mark.ray
def test_divergence_is_reported_by_the_pair(pair, tiny_fp32):
    pair._each(start_again, spec=make_spec(tiny_fp32, num_learners=2))
    batch = batch_of(9)
    batch.rewards_N[0] = NAN
    results = [pair.step(batch) for _ in range(10)]
    assert results[8].diverged is None
    assert "skipped" in results[9].diverged


@pytest.mark.ray
@pytest.mark.soak
def test_a_learner_that_hangs_is_given_up(ray_cluster, tiny_fp32):
    learners = Learners(make_spec(tiny_fp32, num_learners=1), silent_after_s=3.0)
    learner = psutil.Process(learners.pids[0])
    learner.suspend()
    with pytest.raises(LearnerLost, match="no answer for 3 s"):
        learners.step(batch_of(12))
    assert learner.status() == psutil.STATUS_STOPPED
    learners.close()
    learner.wait(30)


@pytest.mark.ray
def test_the_pair_saves_and_loads(pair, tiny_fp32, tmp_path):
    spec = make_spec(tiny_fp32, num_learners=2)
    pair._each(start_again, spec=spec)
    pair.step(batch_of(10))
    pair.save(tmp_path)
    expected = pair.step(batch_of(11))
    pair._each(start_again, spec=spec)
    pair.load(tmp_path)
    assert pair.step(batch_of(11)) == expected
    left, right = pair._each(tensors_of)
    assert all(np.array_equal(left[name], right[name]) for name in left)
