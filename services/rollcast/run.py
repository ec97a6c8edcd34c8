"""A run, assembled: the parts of `train.py`'s story, and what each of its verbs does.

Owns: building learners, store, fleet, ledger and buffer for a configuration; publishing, learning, evaluating,
recording and saving; what is put back on a resume. Does not know how any part works inside.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rollcast import checkpoint, cluster, figures, metrics, records
from rollcast.autoscale import Bounds
from rollcast.best import BestPolicy
from rollcast.buffer import ErrorShare, PlayedGroup, TrajectoryBuffer
from rollcast.chat import ChatCodec
from rollcast.cluster import Dtype
from rollcast.config import RunConfig
from rollcast.control import Wishes
from rollcast.errors import RunDiverged, RunFailed
from rollcast.evaluate import Evaluation, evaluation_prompts
from rollcast.fleet import Fleet, FleetSettings
from rollcast.ledger import Ledger
from rollcast.live.alongside import serve_alongside
from rollcast.plot import learning_curve
from rollcast.probe import probe_tokens
from rollcast.prompts import PromptStream
from rollcast.resume import Start
from rollcast.rundir import write_atomic
from rollcast.runner import WorkerSpec
from rollcast.session import Session
from rollcast.staffing import Staffing
from rollcast.weights import Store
from rollcast_learners.algorithms import OVER_GROUPS
from rollcast_learners.batch import collate
from rollcast_learners.learner import StepResult
from rollcast_learners.policy import PolicySettings
from rollcast_learners.rllib import LearnerSpec
from rollcast_learners.segments import NonFiniteWeights
from rollcast_learners.types import Sampling, Weights

T = TypeVar("T")

LOST_AFTER_LEASES = 3
"""A worker that has not answered for so many lease times is lost."""
EQUAL_GROUPS_IN_A_ROW = 10
"""Steps' worth of prompts without a difference after which dynamic sampling gives up: there may be nothing else."""
LOOK_EVERY_S = 5.0
"""How often a learner with nothing to do is asked whether it lives."""
COUNT_EVERY_S = 1.0
"""How often the nodes of the cluster are counted: they come and go."""
SLOW_REWARD_S = 1.0
"""A call of a user's reward function beyond this is told."""


class Run(Session):
    """Everything alive during training. Made by `opened`; every public method is a verb of the loop."""

    def _build(self, start: Start) -> None:
        config, folder = self.config, self.folder
        rollout = config.rollout
        self.errors = ErrorShare()
        self.dropped_errors = self.dropped_equal = self._equal_in_a_row = 0
        self._learner_thread = ThreadPoolExecutor(1, thread_name_prefix="learner")
        self._closers.callback(self._learner_thread.shutdown, wait=False, cancel_futures=True)
        self._fleet_started = self._learner_starts = False
        self._most = cluster.most_workers(config)
        self._counted = time.monotonic()
        self.sampling = Sampling(rollout.temperature, rollout.max_new_tokens)
        self.groups_per_step = config.learner.prompts_per_step
        fewest, most = rollout.fleet_bounds  # Of more workers than groups at a time, some would have none.
        useful = max(fewest, min(most, self._waiting_room + self.groups_per_step))
        self.staffing = Staffing(Bounds(fewest, useful), rollout.first_workers)
        self.buffer = TrajectoryBuffer(self.groups_per_step, config.buffer.max_staleness)
        self.ledger = Ledger(folder.ledger, rollout.lease_s, rollout.max_attempts)
        self._closers.callback(self.ledger.close)
        self._questions = evaluation_prompts(config.env, config.eval) if config.eval.every else []
        self._stand_at(start)
        self._start_processes(start)

    def _stand_at(self, start: Start) -> None:
        super()._stand_at(start)
        self._evaluation: Evaluation | None = None
        self._figures: dict[str, float] = {}
        self._held: dict[str, float] = {}
        self._held_step = start.step
        self._batch_rows = self._batch_samples = 0
        self._trained: list[int] = []
        self._looked = time.monotonic()
        self.buffer.clear()
        self.ledger.roll_back(start.step)
        self.best = BestPolicy(self.folder, self.config.eval, start.step)

    def _start_processes(self, start: Start) -> None:
        config = self.config
        self._dtype = cluster.compute_dtype(config)
        codec = ChatCodec.of(config.model)
        self._probe_tokens = probe_tokens(codec.tokenizer, config.weights.probe_tokens)
        with self.watch("start learner"):
            self._waiting("the learner to start")
            self._start_learners(learner_spec(config, self._dtype), start)
        with self.watch("start workers"):
            self._waiting("rollout workers to start")
            first = self.folder.high_water_mark() + 1
            self.store = Store(config.run.name, self.learners.node(), first)
            self._closers.callback(self.store.close)
            self.weights = self._write_weights(first)
            self.fleet = self._start_fleet()
            self._announce_to_replicas()
            self._closers.callback(self.fleet.close)
            self._fleet_started = True
            deadline = time.monotonic() + config.rollout.start_timeout_s
            while self.fleet.wanted and not self.fleet.ready() and self.stop.signal is None:
                self._gather("rollout workers to start")
                self._refuse_to_wait_beyond(deadline)
        if config.serve.enabled:
            self._closers.callback(serve_alongside(config, self.folder, self.progress.say))

    def _refuse_to_wait_beyond(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise RunFailed(
                f"No rollout worker has started within {self.config.rollout.start_timeout_s:g} s.",
                self.fleet.missing(),
                "See `rollcast doctor` and the workers' logs in Ray's session folder, or add nodes.",
            )

    def go_back(self, lost: str) -> None:
        """An evaluation in flight is completed first: it needs no learner, and its row may be one that stays."""
        self.finish_evaluation()
        super().go_back(lost)

    def _restart(self, start: Start) -> None:
        # The workers play on and are heard, but given nothing: what a lost policy began to play would be dropped.
        with self.watch("start learner"):
            begun = self._learner_thread.submit(self._begin_again, start)
            self._learner_starts = True
            while not begun.done():
                self._gather("the learner to start")
            self._learner_starts = False
            self.weights = begun.result()
        self._announce()

    def _begin_again(self, start: Start) -> Weights:
        """New learners and their first policy, under a number above all that were given to lost ones."""
        self._start_learners(learner_spec(self.config, self._dtype), start)
        first = self.folder.high_water_mark() + 1
        self.store.begin_again(self.learners.node(), first)
        return self._write_weights(first)

    def _start_fleet(self) -> Fleet:
        config, rollout = self.config, self.config.rollout
        return Fleet(
            WorkerSpec(config, self._dtype),
            FleetSettings(
                rollout.first_workers,
                max(rollout.concurrency // rollout.group_size, 1),
                rollout.cpus_per_worker,
                rollout.gpus_per_worker,
                LOST_AFTER_LEASES * rollout.lease_s,
                rollout.drain_s,
                rollout.start_timeout_s,
            ),
            self.ledger,
            PromptStream(config.env, rollout.group_size, config.run.seed),
            self.store,
            self.sampling,
            self.weights,
        )

    # ---- the verbs of the loop

    @property
    def goes_on(self) -> bool:
        return super().goes_on and not self.best.out_of_patience

    def collect(self) -> list[PlayedGroup] | None:
        """One step's groups, none of them too old; None when the run was asked to stop meanwhile."""
        self.staffing.learner_comes(len(self.buffer) / max(self._waiting_room, 1))
        while self.stop.signal is None:
            for group in self.buffer.expire(self.weights.version):
                self.ledger.put_back(group.number, "too old")
            if self.buffer.ready() and not self.paused:
                self.staffing.learner_goes(self.fleet.ready())
                return self.buffer.take()
            with self.watch("paused" if self.paused else "wait for rollouts"):
                self._feed_and_gather("to be resumed" if self.paused else "rollouts")
                self._look_after_learners()
        return None

    def learn(self, groups: Sequence[PlayedGroup]) -> StepResult:
        """One learning step in the learner's process; workers are fed and heard meanwhile."""
        batch = collate([t for group in groups for t in group.trajectories], self.config.learner.on_length)
        self._note_batch(groups, batch.trained_tokens, batch.tokens)
        with self.watch("learn"):
            result = self._meanwhile(self._learner_thread.submit(self.learners.step, batch), "the learner")
        if result.diverged is not None:
            raise RunDiverged("The run diverged.", result.diverged, "Lower learner.learning_rate, then --resume auto.")
        self.step += 1
        self._trained = [group.number for group in groups]
        self._figures |= result.metrics
        played = [t for group in groups for t in group.trajectories]
        records.write(self.folder.rollouts, self.step, played, result.details)
        return result

    def publish(self) -> None:
        """The next version, announced to all workers. An evaluation in flight is waited for: it names one version."""
        self.finish_evaluation()
        with self.watch("publish"):
            started = time.monotonic()
            self.weights = self._meanwhile(
                self._learner_thread.submit(self._write_weights, self.weights.version + 1),
                "the learner to publish",
            )
            self._figures["sync/publish_s"] = time.monotonic() - started
            self._announce()
        # Only now do they make room for new groups: one started before the announcement would be a version older.
        self.ledger.trained(self._trained, self.step)

    def evaluate(self) -> None:
        """Starts an evaluation of the current policy beside whatever comes next."""
        if self._questions:
            self._evaluation = Evaluation(
                self.step, self.weights.version, self._questions, self.config.eval, self.sampling
            )
            self._evaluation.ask(self.fleet)

    def finish_evaluation(self) -> None:
        """Waits for the evaluation in flight, if any, and completes the row that was held for it."""
        if self._evaluation is None:
            return
        with self.watch("wait for evaluation"):
            while not self._evaluation.done(self.fleet):
                self._feed_and_gather("the evaluation")
        done, self._evaluation = self._evaluation, None
        measured, signatures = done.figures()
        self._held |= measured
        records.write(self.folder.evaluations, done.step, [*done.answers, *done.sampled])
        write_atomic(self.folder.signatures, json.dumps(signatures, indent=2) + "\n")
        self._write_row()
        self._judge(done, measured)

    def _judge(self, done: Evaluation, measured: dict[str, float]) -> None:
        """Keeps the policy that was measured if it is the best one: nothing newer has been published yet."""
        assert done.version == self.weights.version, "an evaluation is over before the next version is published"
        with self.watch("checkpoint"):
            self.best.judge(done.step, done.version, measured, lambda path: self.store.save(self.weights, path))
        if self.best.out_of_patience:
            settings = self.config.eval
            self.progress.say(
                f"stopping early: {settings.patience} evaluations in a row without a better {settings.best_metric}"
            )

    def record(self) -> None:
        """One row of metrics and one line on the terminal, once the evaluation of this step is in."""
        now = time.monotonic()
        self._held = self._figures | self._rates(now - self._last_row)
        self._held_step = self.step
        self._figures, self._last_row = {}, now
        if self._evaluation is None:
            self._write_row()

    def save(self) -> None:
        """A checkpoint of the current step; the learner writes its own files."""
        with self.watch("checkpoint"):
            self.ledger.flush()
            trainer = {"step": self.step, "policy_version": self.weights.version, "rollcast": 1}
            write = self._learner_thread.submit(
                checkpoint.save, self.folder.checkpoints, self.step, trainer, self.learners.save
            )
            self._meanwhile(write, "the checkpoint")
            checkpoint.prune(self.folder.checkpoints, self.config.checkpoint.keep_last)
            self._keep_weights()
        self._note_saved()

    def finish(self) -> None:
        """After the last step, or when asked to stop: whatever is not on the disk yet goes there."""
        self.finish_evaluation()
        if self._saved_step != self.step:
            self.save()
        learning_curve(metrics.read(self.folder.metrics), self.folder.curve, self.config.run.name)

    # ---- what the verbs are made of

    def _write_weights(self, version: int) -> Weights:
        """Raises the high-water mark first, so that no number ever means two policies."""
        self.folder.raise_high_water_mark(version)
        retire = self.store.free(version - 1)
        try:
            segments, manifest = self.learners.publish(version, self.store.folder, retire)
        except NonFiniteWeights as error:
            raise RunDiverged(
                "The policy is not finite and was not published.",
                str(error),
                "Resume, with a lower learner.learning_rate.",
            ) from error
        probe = self.learners.probe(self._probe_tokens) if self.config.rollout.engine != "scripted" else None
        kind = self.config.published_kind
        return Weights(kind, version, manifest, segments, self.store.home, self.store.folder, probe)

    def _keep_weights(self) -> None:
        """The newest published policy as safetensors in the run folder: what serves and outlives the run."""
        self.store.save(self.weights, self.folder.published(self.weights.version))
        self.folder.forget_published_but(self.weights.version)

    def _look_after_learners(self) -> None:
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self.learners.look()
            self._looked = time.monotonic()

    def _meanwhile(self, future: Future[T], activity: str) -> T:
        """Keeps feeding and hearing workers until the learner's thread has an answer."""
        while not future.done():
            self._feed_and_gather(activity)
        return future.result()

    def _feed_and_gather(self, activity: str) -> None:
        # A group started now is trained at the latest after those before it: this many bounds its age.
        if not self.paused:
            self.fleet.feed(self._waiting_room + self.groups_per_step)
        self._gather(activity)

    @property
    def _waiting_room(self) -> int:
        """Groups that may wait in the buffer while a batch is learned from."""
        return self.config.buffer.max_staleness * self.groups_per_step

    def _heed(self, wishes: Wishes) -> None:
        super()._heed(wishes)
        if not self._fleet_started:
            return
        size = wishes.workers
        if size is None:
            size = self.staffing.wanted(self.paused, self.fleet.ready(), self._most)
        # A learner that has lost its node finds a place on another one.
        self.fleet.set_size(min(size, self._most) if self._learner_starts else size)

    def _announce(self) -> None:
        """Tells workers and replicas of the newest policy."""
        self.fleet.announce(self.weights)
        self._announce_to_replicas()

    def _announce_to_replicas(self) -> None:
        handle = self.store.handle(self.fleet.tensors)
        self._announced_on = handle.agents.keys()
        self.line.announce(self.weights, handle)

    def _gather(self, activity: str) -> None:
        needed = 2 if self.config.learner.normalize_advantages in OVER_GROUPS else 1
        for group in self.fleet.gather():
            self.errors.add(group)
            self.dropped_errors += len(group.errors)
            if len(group.usable.trajectories) < needed:
                self.ledger.fail(group.number, group.errors[0])
            elif self.config.learner.dynamic_sampling and not self._teaches(group.usable):
                self.dropped_equal += len(group.trajectories)
                self.ledger.skip(group.number, "all samples equally good")
            else:
                self.buffer.add([group.usable])
        for notice in self.fleet.notices:
            self.progress.say(notice)
        self.fleet.notices.clear()
        self._stop_on_errors()
        self._waiting(activity)

    def _teaches(self, group: PlayedGroup) -> bool:
        """Whether its samples differ in reward. After too many in a row that do not, others are taken as they are."""
        rewards = [trajectory.reward for trajectory in group.trajectories]
        self._equal_in_a_row = 0 if max(rewards) > min(rewards) else self._equal_in_a_row + 1
        limit = EQUAL_GROUPS_IN_A_ROW * self.groups_per_step
        if self._equal_in_a_row == limit + 1:
            self.progress.say(f"{limit} prompts in a row had equally good samples: dynamic sampling lets them pass")
        return not 0 < self._equal_in_a_row <= limit

    def _stop_on_errors(self) -> None:
        limit = self.config.rollout.max_error_share
        if self.errors.seen >= self.config.samples_per_step and self.errors.share > limit:
            raise RunFailed(
                f"{self.errors.share:.0%} of the last {self.errors.seen} episodes failed (limit {limit:.0%}).",
                f"The first failure was: {self.errors.first_cause}",
                "Mend the environment (or raise rollout.max_error_share), then run the same command again.",
            )

    def _note_batch(self, groups: Sequence[PlayedGroup], trained: int, rows: int) -> None:
        trajectories = [t for group in groups for t in group.trajectories]
        self._figures |= figures.of_batch(trajectories, self.weights.version, trained, rows)
        self._batch_rows, self._batch_samples = rows, len(trajectories)
        for name, longest in self._figures.items():
            if name.startswith("reward_s/") and name.endswith("/max") and longest > SLOW_REWARD_S:
                function = name.split("/")[1]
                self.progress.say(f"reward {function} is slow: up to {longest:.1f} s a call in step {self.step + 1}")

    def _rates(self, seconds: float) -> dict[str, float]:
        """Where the time since the last row went: every role busy, idle, and what it waited for."""
        self.fleet.ask_occupation()
        occupations, self.fleet.occupations = self.fleet.occupations, []
        loaded, self.fleet.loaded = self.fleet.loaded, []
        rates = figures.of_time(self.watch.lap(), seconds, self._batch_samples, self._batch_rows)
        rates |= figures.of_workers(occupations, self.fleet.ready()) | figures.of_loads(loaded)
        return rates | self._counts()

    def _counts(self) -> dict[str, float]:
        return {
            "policy_version": float(self.weights.version),
            "dropped/stale": float(self.buffer.dropped_stale),
            "dropped/error": float(self.dropped_errors),
            "dropped/equal": float(self.dropped_equal),
            "fleet/workers": float(self.fleet.ready()),
            "fleet/wanted": float(self.fleet.wanted),
            "fleet/restarts": float(self.fleet.restarts),
            "learner/restarts": float(self.learner_restarts),
            **{f"ledger/{state}": float(count) for state, count in self.ledger.counts().items()},
        }

    def _write_row(self) -> None:
        self.progress.step(self.writer.write(self._held_step, self._held))

    def _waiting(self, activity: str) -> None:
        if time.monotonic() - self._counted > COUNT_EVERY_S:
            self._most, self._counted = cluster.most_workers(self.config), time.monotonic()
            if self._fleet_started and self.store.agents.keys() != self._announced_on:
                self._announce_to_replicas()
        facts: dict[str, object] = {"step": self.step, "most_workers": self._most}
        if self._fleet_started:
            self.line.show(self.fleet.crew())
            facts |= {
                "version": self.weights.version,
                "workers": self.fleet.ready(),
                "wanted": self.fleet.wanted,
                "draining": self.fleet.draining(),
                "buffered": len(self.buffer),
            }
            facts |= self.ledger.counts()
        self._tell(activity, facts)


def learner_spec(config: RunConfig, dtype: Dtype, supervised: bool = False) -> LearnerSpec:
    """What a learner is built from, out of a run's configuration."""
    model = config.model
    return LearnerSpec(
        PolicySettings(
            model.path,
            dtype,
            config.learner.critic,
            model.trust_remote_code,
            config.learner.head,
            config.learner.activation_checkpointing,
            config.learner.compile,
            config.adapter,
        ),
        config.learner,
        config.kl,
        config.buffer,
        1.0 if supervised else config.rollout.temperature,
        config.run.steps,
        config.rollout.max_new_tokens,
        config.run.seed,
        supervised,
    )
