"""RLlib runs the learner: `TorchRLModule`, `TorchLearner` and `LearnerGroup` around `PolicyLearner`.

Owns: how RLlib's classes are used, and which of its defaults are switched off. The only file of this package
that knows Ray. Does not know where batches come from or where weights go.

RLlib's rules here: one opaque batch per learner through `batches=`, because its iterators slice every column
at one index; `num_epochs=1` and no `minibatch_size`, because epochs and minibatches are ours; no DDP wrapper,
because one all-reduce an optimiser step carries everything; no `get_weights` and no `save_to_path`, which
fail on bfloat16.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.actor_manager import CallResult
from torch import Tensor

from rollcast_learners import sharding, state
from rollcast_learners.arena import Arena, policy_specs
from rollcast_learners.batch import Batch
from rollcast_learners.errors import LearnerLost
from rollcast_learners.learner import PolicyLearner, StepResult
from rollcast_learners.policy import Outputs, Policy, PolicySettings, Reference
from rollcast_learners.segments import TensorSpec
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from rollcast_learners.supervised import SupervisedLearner
from rollcast_learners.types import Probe, TensorEntry

PACKED = "packed"
LOOK_EVERY_S = 1.0
"""How long the death of one learner may go unnoticed while others are waited for."""
DEATH_SHOWS_AFTER_S = 10.0
"""A learner whose partner died may fail with it before Ray has noticed the death: errors are told after this long."""
SILENT_AFTER_S = 3600.0
"""A learner that has not answered for so long hangs. Collectives give up after half of it."""
T = TypeVar("T")


@dataclass(frozen=True)
class LearnerSpec:
    """Everything a learner process is built from. Trainer -> learner."""

    policy: PolicySettings
    learner: LearnerSettings
    kl: KLSettings
    correction: CorrectionSettings
    temperature: float
    total_steps: int
    answer_tokens: int
    """Longest answer of one turn: what `loss_mean = "constant"` divides by."""
    seed: int
    supervised: bool = False
    """Whether it learns from references (`sft`) instead of rewards."""


class LMModule(TorchRLModule, ValueFunctionAPI):
    """The policy as RLlib sees it: a batch is the opaque packed one."""

    def setup(self) -> None:
        self.policy = Policy(self.model_config["policy"])

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        outputs: Outputs = self.policy(opaque(batch))
        return outputs._asdict()

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        return self.policy.score_values(opaque(batch))[0]


class LMConfig(AlgorithmConfig):
    """An algorithm config that only carries the learner's spec; RLlib's own training settings stay unused."""

    spec: LearnerSpec

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        space = gymnasium.spaces.Text(1)  # Read by nobody: no catalog is built.
        return RLModuleSpec(LMModule, space, space, model_config={"policy": self.spec.policy})

    def get_default_learner_class(self) -> type[TorchLearner]:
        return LMLearner


class LMLearner(TorchLearner):
    """`PolicyLearner` inside RLlib's learner process."""

    # RLlib's abstract hook for a loss on its own forward pass; our `_update` makes the whole step.
    compute_loss_for_module: Any = None

    def __init__(self, *, config: LMConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.spec = config.spec
        self.arena: Arena | None = None
        self.specs: tuple[TensorSpec, ...] = ()
        self.result: StepResult | None = None

    def build(self) -> None:
        if threads := self._threads():
            torch.set_num_threads(threads)
        super().build()
        policy: Policy = self.module[DEFAULT_MODULE_ID].policy
        reference: Reference | None = None
        if self.spec.kl.kind != "none" and self.spec.policy.adapter is not None:
            reference = policy.without_adapter()
        elif self.spec.kl.kind != "none":
            frozen = dataclasses.replace(self.spec.policy, critic="none", activation_checkpointing=False)
            reference = Policy(frozen).requires_grad_(False)
            self._place(reference, policy.device)
        kind = SupervisedLearner if self.spec.supervised else PolicyLearner
        self.core = kind(
            policy,
            self.spec.learner,
            self.spec.kl,
            self.spec.correction,
            temperature=self.spec.temperature,
            total_steps=self.spec.total_steps,
            answer_tokens=self.spec.answer_tokens,
            seed=self.spec.seed,
            reference=reference,
            reduce=self._sum_over_learners,
        )

    def _threads(self) -> int:
        """How many it is told to use; 0 leaves what torch found."""
        alone = self.config.num_learners > 0 and self.config.num_gpus_per_learner == 0
        return self.spec.learner.threads or (self.spec.learner.cpus_per_learner if alone else 0)

    def configure_optimizers(self) -> None:
        """None of RLlib's: `PolicyLearner` owns the optimiser, over float32 masters that RLlib does not know."""

    def _map_module_to_device(self, module: Any) -> None:
        """RLlib's hook between a module and its optimiser. A sharded policy is never whole on the device."""
        self._place(module[DEFAULT_MODULE_ID].policy, self._device)

    def _place(self, policy: Policy, device: torch.device) -> None:
        if self.spec.learner.sharding == "fsdp":
            policy.shard(device)
        else:
            policy.to(device)

    def _make_modules_ddp_if_necessary(self) -> None:
        """Never: see the module's docstring."""

    def _sum_over_learners(self, tensor: Tensor) -> None:
        if self.config.num_learners > 1:
            moved = tensor.to(self.core.policy.device)  # NCCL sums nothing but what lies on its own GPU.
            torch.distributed.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The group's way in. RLlib's own exits the process on any exception; here it is told to the caller."""
        return func(self, *args, **kwargs)

    def _update(self, batch: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        self.result = self.core.step(opaque(batch[DEFAULT_MODULE_ID]))
        return {}, {}, {}


def opaque(batch: dict[str, Any]) -> Batch:
    """The packed batch out of the one-element column that RLlib carries it in."""
    packed: Batch = batch[PACKED][0]
    return packed


def wrap(batch: Batch) -> MultiAgentBatch:
    """A packed batch in the clothes RLlib wants: an object column is the only kind it leaves alone."""
    column = np.empty(1, object)
    column[0] = batch
    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch({PACKED: column})}, env_steps=max(batch.trained_tokens, 1))


class Learners:
    """RLlib's learner group with 0 (in this process), 1 or N learners.

    Every call raises `LearnerLost` when one of them is dead, or answers no more: then all of them are of no use, since
    the others may wait for it in a collective. `close` ends them all the same. One thread at a time may call.
    """

    def __init__(self, spec: LearnerSpec, silent_after_s: float = SILENT_AFTER_S) -> None:
        settings = spec.learner
        config = (
            LMConfig()
            .framework("torch")
            .api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
            .learners(
                num_learners=settings.num_learners,
                num_cpus_per_learner=settings.cpus_per_learner,
                num_gpus_per_learner=settings.gpus_per_learner,
                num_aggregator_actors_per_learner=0,
                learner_class=LMLearner,
            )
        )
        config.spec = spec
        self.count = max(settings.num_learners, 1)
        self._silent_after_s = silent_after_s
        self._lost = False
        self.sharded = settings.sharding != "none"
        self.group = _group(config)
        try:
            self.pids = self._each(_pid)
            """Process ids, for whoever wants to look at (or end) one."""
        except LearnerLost:
            self.close()
            raise

    def step(self, batch: Batch) -> StepResult:
        """One learning step over all learners; blocks until it is done."""
        shares = [batch] if self.count == 1 else batch.shares(self.count)
        if self.group.is_remote:
            self.group.update(batches=[wrap(share) for share in shares], async_update=True)
            self._answers(self.count)
        else:
            self.group.update(batch=wrap(batch))
        results = self._each(_take_result)
        return dataclasses.replace(results[0], details=tuple(part for result in results for part in result.details))

    def publish(
        self, version: int, folder: str, retire: list[int], digest: bool = True
    ) -> tuple[tuple[str, ...], tuple[TensorEntry, ...]]:
        """The first learner writes the policy into `folder` on its node; nobody reads those in `retire`."""
        return self._leading(_publish, version=version, folder=folder, retire=retire, digest=digest)

    def probe(self, token_ids_RL: NDArray[np.int32]) -> Probe:
        return self._leading(_probe, token_ids_RL=token_ids_RL)

    def held_out_loss(self, batch: Batch) -> float:
        """Of a supervised learner: mean negative log-likelihood of the batch's trained tokens."""
        return self._leading(_held_out_loss, batch=batch)

    def save(self, folder: Path) -> None:
        self._leading(_save, folder=str(folder))

    def load(self, folder: Path) -> None:
        self._each(_load, folder=str(folder))

    def node(self) -> str:
        """The Ray node of the first learner: where it writes what it publishes."""
        return self._first(_node)

    def cpu_seconds(self) -> float:
        return sum(self._each(_cpu_seconds))

    def look(self) -> None:
        """Asks whether all of them live; for while they have nothing to do."""
        self._each(_pid)

    def close(self) -> None:
        """Ends all learners and what they published; may be called again."""
        try:
            if not self._lost:
                self._first(_close_arena)
                self.group.shutdown()
        except LearnerLost:
            pass
        if self._lost:  # Nobody can be asked to end in good order: a survivor may be stuck in a collective.
            self.group._backend_executor.shutdown(graceful_termination=False)
            self.group._is_shut_down = True

    def _first(self, function: Callable[..., T], **kwargs: Any) -> T:
        return self._ask(partial(function, **kwargs), [0])[0]

    def _leading(self, function: Callable[..., T], **kwargs: Any) -> T:
        """The first learner's answer, to which the others of a sharded policy have to contribute."""
        return self._each(function, **kwargs)[0] if self.sharded else self._first(function, **kwargs)

    def _each(self, function: Callable[..., T], **kwargs: Any) -> list[T]:
        return self._ask(partial(function, **kwargs), list(range(self.count)))

    def _ask(self, function: Callable[..., T], ids: list[int]) -> list[T]:
        """What these learners answer, in this order."""
        if not self.group.is_remote:
            return [result.get() for result in self.group.foreach_learner(function)]
        self.group._worker_manager.foreach_actor_async(function, remote_actor_ids=ids)
        return self._answers(len(ids))

    def _answers(self, count: int) -> list[Any]:
        """The answers to the call that has just been sent to `count` learners."""
        results: list[CallResult] = []
        begun = time.monotonic()
        failed_at: float | None = None
        while len(results) < count and (failed_at is None or time.monotonic() - failed_at < DEATH_SHOWS_AFTER_S):
            results += self.group._worker_manager.fetch_ready_async_reqs(timeout_seconds=LOOK_EVERY_S)
            errors = [result.get() for result in results if not result.ok]
            dead = [error for error in errors if isinstance(error, RayActorError)]
            if dead:
                raise self._loss(_last_line(dead[0]))
            if time.monotonic() - begun > self._silent_after_s:
                raise self._loss(f"no answer for {self._silent_after_s:g} s")
            if errors and failed_at is None:
                failed_at = time.monotonic()
        self._raise_mistake(results)
        return [result.get() for result in sorted(results, key=lambda result: result.actor_id)]

    def _raise_mistake(self, results: list[CallResult]) -> None:
        """What went wrong in a learner that lives on; RLlib would ask it nothing any more."""
        failed = [result for result in results if not result.ok]
        for result in failed:
            self.group._worker_manager.set_actor_state(result.actor_id, healthy=True)
        if failed:
            error = failed[0].get()
            raise getattr(error, "cause", error) from error  # As it was raised there, with the way it came.

    def _loss(self, why: str) -> LearnerLost:
        self._lost = True
        return LearnerLost(why)


def _group(config: LMConfig) -> LearnerGroup:
    try:
        return LearnerGroup(config=config, module_spec=config.get_default_rl_module_spec())
    except RayActorError as error:
        why = _last_line(error)
    except TimeoutError:  # Ray Train's, for the place of all of them together.
        each = f"{config.num_cpus_per_learner:g} CPUs and {config.num_gpus_per_learner:g} GPUs"
        why = f"Ray found no place for {config.num_learners} learners with {each} each within its time."
    # Raised only here, where no traceback holds on to the half-made group: its other learners end with it.
    raise LearnerLost(why)


def _last_line(error: RayActorError) -> str:
    """Ray says last what became of the process, and then what may have been the cause."""
    return str(error).strip().splitlines()[-1].strip().partition(" Some common causes")[0]


def _take_result(learner: LMLearner) -> StepResult:
    result, learner.result = learner.result, None
    if result is None:
        raise RuntimeError("the learner was asked for a result before it had made a step")
    return result


def _publish(
    learner: LMLearner, version: int, folder: str, retire: list[int], digest: bool
) -> tuple[tuple[str, ...], tuple[TensorEntry, ...]]:
    policy = learner.core.policy
    if sharding.is_sharded(policy):
        return _publish_gathered(learner, version, folder, retire, digest)
    tensors = dict(policy.published())
    if learner.arena is None:
        learner.arena = Arena(folder, policy_specs(tensors))
    for old in retire:
        learner.arena.retire(old)
    return learner.arena.write(version, tensors, digest=digest)


def _publish_gathered(
    learner: LMLearner, version: int, folder: str, retire: list[int], digest: bool
) -> tuple[tuple[str, ...], tuple[TensorEntry, ...]]:
    """All ranks gather tensor by tensor, and the first copies each into the arena before the next one comes.

    An arena is of one node and its manifest has whole tensors, so ranks on other nodes cannot write their rows.
    """
    policy = learner.core.policy
    if not learner.specs:
        learner.specs = tuple(TensorSpec(name, policy.settings.dtype, tuple(t.shape)) for name, t in policy.published())
    with sharding.in_step(policy.published()) as tensors:
        if not sharding.writes(policy):
            return (), ()
        if learner.arena is None:
            learner.arena = Arena(folder, learner.specs)
        for old in retire:
            learner.arena.retire(old)
        return learner.arena.write(version, tensors, digest=digest)


def _probe(learner: LMLearner, token_ids_RL: NDArray[np.int32]) -> Probe:
    policy = learner.core.policy
    scored_RL = policy.score_rows(torch.from_numpy(token_ids_RL.astype(np.int64)).to(policy.device))
    return Probe(token_ids_RL, scored_RL.float().cpu().numpy())


def _held_out_loss(learner: LMLearner, batch: Batch) -> float:
    assert isinstance(learner.core, SupervisedLearner), "only a supervised learner has a held-out loss"
    return learner.core.held_out_loss(batch)


def _save(learner: LMLearner, folder: str) -> None:
    state.save(learner.core, Path(folder))


def _load(learner: LMLearner, folder: str) -> None:
    state.load(learner.core, Path(folder))


def _node(learner: LMLearner) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _pid(learner: LMLearner) -> int:
    return os.getpid()


def _cpu_seconds(learner: LMLearner) -> float:
    times = os.times()
    return times.user + times.system


def _close_arena(learner: LMLearner) -> None:
    if learner.arena is not None:
        learner.arena.close()
