"""`rollcast sft`: a supervised warm start on an environment's references, for tasks that a model cannot begin to do.

Owns: the order of the examples, the held-out loss, and the policy folder that training goes on from. Does not know how
a reference becomes tokens (`references.py`) nor how it is learned (`rollcast_learners.supervised`).

A run of `sft` is a run like any other: the same folder, metrics, checkpoints, `rollcast eval` and `rollcast export`.
Step N is made of the same examples whenever it is made, so that a resumed run goes on as if nothing had happened.
"""

import random
import shutil
import signal
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rollcast import checkpoint, cluster
from rollcast.chat import ChatCodec
from rollcast.config import EnvSection, RunConfig
from rollcast.errors import RunDiverged
from rollcast.export import export
from rollcast.references import ReferenceSource
from rollcast.resume import Start
from rollcast.run import learner_spec
from rollcast.runs import Source
from rollcast.session import Session, opened
from rollcast_learners.batch import Batch, collate
from rollcast_learners.types import Trajectory

POLICY = "policy"
"""Folder of the run that holds the last policy in Hugging Face's form: what `model.path` of the next run names."""
HELD_OUT_EXAMPLES = 128
REST_S = 0.2


def sft(config: RunConfig, run_dir: Path, resume: str = "auto") -> None:
    """Runs or resumes a warm start in `run_dir`. Raises `RollcastError`; `KeyboardInterrupt` after Ctrl-C, saved."""
    with opened(config, run_dir, resume, SupervisedRun, plays=False) as run:
        run.see_through(loop)
        stopped_by = run.stop.signal
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


def loop(run: "SupervisedRun") -> None:
    """From the held-out loss before the first step, or the checkpoint the run stands at, to the policy folder."""
    if run.step == 0 and run.goes_on:
        run.evaluate()
        run.record()
    while run.goes_on:
        run.rest()
        run.learn(run.examples())
        if run.is_due(run.config.eval.every):
            run.evaluate()
        run.record()
        if run.is_due(run.config.checkpoint.every):
            run.save()
    run.finish()


class SupervisedRun(Session):
    """A learner and the references it learns from. Made by `opened`; every public method is a verb of the loop."""

    def _build(self, start: Start) -> None:
        config = self.config
        self._stand_at(start)
        codec = ChatCodec.of(config.model)
        self._train = [self._source(env, "train", codec) for env in config.env]
        for source in self._train:
            self._closers.callback(source.close)
        self._held_out = collate(self._first(config, codec))
        self._restart(start)

    def _stand_at(self, start: Start) -> None:
        super()._stand_at(start)
        self._figures: dict[str, float] = {}
        self._tokens = 0

    def _restart(self, start: Start) -> None:
        self._waiting("the learner to start")
        settings = self.config.without_rollouts()
        spec = learner_spec(settings, cluster.compute_dtype(self.config), supervised=True)
        self._start_learners(spec, start)

    # ---- the verbs of the loop

    def rest(self) -> None:
        """Waits as long as the run is paused, and not asked to stop."""
        while self.paused and self.stop.signal is None:
            with self.watch("paused"):
                self._waiting("to be resumed")
                time.sleep(REST_S)

    def examples(self) -> Batch:
        """The references of the next step: each environment's split in an order drawn anew each time through."""
        count = self.config.samples_per_step
        with self.watch("read examples"):
            return collate([self._example(self.step * count + place) for place in range(count)])

    def learn(self, batch: Batch) -> None:
        self._waiting("the learner")
        with self.watch("learn"):
            result = self.learners.step(batch)
        if result.diverged is not None:
            raise RunDiverged("The run diverged.", result.diverged, "Lower learner.learning_rate, then --resume auto.")
        self.step += 1
        self._tokens += batch.trained_tokens
        self._figures |= {
            **result.metrics,
            "tokens/trained": float(batch.trained_tokens),
            "tokens/useful_ratio": batch.trained_tokens / batch.tokens,
        }

    def evaluate(self) -> None:
        """Mean negative log-likelihood of held-out references, in nat a token."""
        self._waiting("the held-out loss")
        with self.watch("evaluate"):
            self._figures["eval/loss"] = self.learners.held_out_loss(self._held_out)

    def record(self) -> None:
        """One row of metrics and one line on the terminal."""
        now = time.monotonic()
        seconds = {f"time/{stage.replace(' ', '_')}_s": s for stage, s in self.watch.lap().items()}
        if self.step:
            self._figures["learner/tokens_per_s"] = self._tokens / (now - self._last_row)
        restarts = {"learner/restarts": float(self.learner_restarts)}
        row = self.writer.write(self.step, self._figures | seconds | restarts)
        self.progress.step(row)
        self._figures, self._tokens, self._last_row = {}, 0, now

    def save(self) -> None:
        """A checkpoint of the current step."""
        self._waiting("the checkpoint")
        with self.watch("checkpoint"):
            trainer = {"step": self.step, "policy_version": self.step, "rollcast": 1}
            checkpoint.save(self.folder.checkpoints, self.step, trainer, self.learners.save)
            checkpoint.prune(self.folder.checkpoints, self.config.checkpoint.keep_last)
        self._note_saved()

    def finish(self) -> None:
        """After the last step, or when asked to stop: a checkpoint, and after the last step the policy folder."""
        if self._saved_step != self.step:
            self.save()
        if self.step >= self.config.run.steps:
            target = self.folder.path / POLICY
            shutil.rmtree(target, ignore_errors=True)
            export(Source(self.folder), target, "last", self.config, self.progress.say)
            self.progress.say(f"the policy is in {target}: name it as model.path to go on with `rollcast train`")

    # ---- what the verbs are made of

    def _source(self, env: EnvSection, split: str, codec: ChatCodec) -> ReferenceSource:
        return ReferenceSource(env, split, codec, self.config.rollout.max_model_len)

    def _example(self, number: int) -> Trajectory:
        """Example `number` of the run."""
        weights = [env.weight for env in self.config.env]
        (place,) = random.Random(f"{self.config.run.seed}/sft/{number}").choices(range(len(weights)), weights)
        source = self._train[place]
        if source.size is None:
            return source.example(number)
        time_through, position = divmod(number, source.size)
        return source.example(int(_order(source.size, self.config.run.seed, time_through)[position]))

    def _first(self, config: RunConfig, codec: ChatCodec) -> Sequence[Trajectory]:
        """The first examples of the evaluation's split, over all environments."""
        count = config.eval.samples or HELD_OUT_EXAMPLES
        sources = [self._source(env, config.eval.split, codec) for env in config.env]
        found = [source.example(i) for source in sources for i in range(min(count, source.size or count))]
        for source in sources:
            source.close()
        return found

    def _waiting(self, activity: str) -> None:
        self._tell(activity, {"step": self.step, "most_workers": 0})


@lru_cache(maxsize=8)
def _order(size: int, seed: int, time_through: int) -> NDArray[np.int64]:
    """The records of a split in the order of one time through it."""
    return np.random.default_rng([seed, time_through]).permutation(size)
