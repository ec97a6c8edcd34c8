"""A run from its first process to its last: opened, asked to stop by signals, and closed whatever happened.

Owns: the order of opening and closing, how signals and wishes ask a run to stop or to rest, what every loop asks of its
run, and going back to the newest checkpoint when a learner dies. Does not know what is done in a step.
"""

import os
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

from rollcast import cluster, metrics
from rollcast.config import RunConfig
from rollcast.control import Line, Wishes
from rollcast.errors import RunFailed
from rollcast.evaluate import made_once
from rollcast.progress import Progress
from rollcast.resume import Start, choose_start
from rollcast.rundir import RunDir
from rollcast_learners.rllib import LearnerLost, Learners, LearnerSpec

DEATHS_IN_A_ROW = 3
"""A run whose learners die so often without a new checkpoint in between fails: the next ones would die too."""
LEARNER_FIX = (
    "See whether memory ran out (`dmesg`, or the learner's log in Ray's session folder): lower "
    "learner.microbatch_tokens, or give it more. Then --resume auto."
)


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal. SIGTERM, the first Ctrl-C and `rollcast stop` ask;
    it may still be starting then. A second Ctrl-C interrupts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._say = say

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(number)

    def ask(self, number: int = signal.SIGTERM) -> None:
        """As if that signal had come."""
        self.signal = number
        self._say("stopping: the run saves a checkpoint first")


class Session(ABC):
    """What the loops of `train` and of `sft` have in common: where they stand, and whether they go on.

    `_build` makes the processes and gives each one's end to `_closers`, so that a run that fails half-way leaves none.
    A start, a resume and the death of a learner all take the run to a `Start`: `_stand_at` says where that is, and
    `_start_learners` brings the learners there.
    """

    learners: Learners

    def __init__(
        self, config: RunConfig, folder: RunDir, start: Start, progress: Progress, stop: StopRequest, line: Line
    ) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.stop = stop
        self.line = line
        self.paused = False
        self.learner_restarts = self._deaths = 0
        self._again = start.again
        self.watch = metrics.Stopwatch()
        self.writer = metrics.MetricsWriter(folder.metrics, folder.tensorboard if config.tracking.tensorboard else None)
        self._closers = ExitStack()
        self._closers.callback(self.writer.close)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._build_or_fail(start)
            undo.pop_all()

    def _build_or_fail(self, start: Start) -> None:
        try:
            self._build(start)
        except LearnerLost as lost:
            raise RunFailed("The learner died while it started.", str(lost), LEARNER_FIX) from lost

    @abstractmethod
    def _build(self, start: Start) -> None:
        """Everything alive of the run."""

    def _stand_at(self, start: Start) -> None:
        """Everything that says where the run stands, as it was at `start`."""
        self.step = self._saved_step = start.step
        self.watch.lap()
        self._last_row = time.monotonic()

    @abstractmethod
    def _restart(self, start: Start) -> None:
        """New learners in a run that is alive otherwise."""

    def _start_learners(self, spec: LearnerSpec, start: Start) -> None:
        """Learners as they were at `start`."""
        self.learners = Learners(spec)
        self._closers.callback(self.learners.close)
        if start.checkpoint is not None:
            self.learners.load(start.checkpoint)

    def see_through(self, loop: Callable[[Self], None]) -> None:
        """The loop to its end; begun again from the newest checkpoint whenever a learner dies."""
        lost: str | None = None
        while True:
            try:
                if lost is not None:
                    self.go_back(lost)
                return loop(self)
            except LearnerLost as error:
                lost = str(error)

    def go_back(self, lost: str) -> None:
        """Ends what is left of the learners (`lost` says why), and stands with new ones where a resume would.

        Raises `RunFailed` after `DEATHS_IN_A_ROW`, and `LearnerLost` when the new ones die at once.
        """
        self._deaths += 1
        self.learners.close()
        if self._deaths >= DEATHS_IN_A_ROW:
            what = f"Learners died {self._deaths} times without a new checkpoint in between."
            raise RunFailed(what, lost, LEARNER_FIX)
        self.progress.say(f"a learner died in step {self.step + 1}; new ones are started. {lost}")
        start = choose_start(self.folder, self._again, self.progress.say)
        if start.checkpoint is None:
            self.progress.say("there is no checkpoint yet: the run begins again with the model it was given")
        self._stand_at(start)
        self._restart(start)
        self.learner_restarts += 1

    def _note_saved(self) -> None:
        """A checkpoint of this step is on the disk: from now on it is what the run goes back to."""
        self._saved_step, self._again, self._deaths = self.step, "auto", 0

    def _tell(self, activity: str, facts: Mapping[str, Any]) -> None:
        """Says what the run does to whoever looks, and heeds what was asked of it. Called all the while."""
        said = {**facts, "paused": self.paused}
        self.progress.waiting(activity, said)
        self._heed(self.line.say(self.progress.status(activity, said)))

    def _heed(self, wishes: Wishes) -> None:
        if wishes.stop and self.stop.signal is None:
            self.stop.ask()
        if wishes.paused != self.paused:
            self.paused = wishes.paused
            self.progress.say("paused: nothing more is learned until it is resumed" if self.paused else "resumed")

    @property
    def goes_on(self) -> bool:
        return self.step < self.config.run.steps and self.stop.signal is None

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: never), and after the last one, is due now."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.steps)

    def close(self) -> None:
        """Ends what the run started; leaves no process and no shared memory."""
        self._closers.close()


R = TypeVar("R", bound=Session)


@contextmanager
def opened(
    config: RunConfig,
    path: Path,
    resume: str,
    make: Callable[[RunConfig, RunDir, Start, Progress, StopRequest, Line], R],
    plays: bool = True,
) -> Iterator[R]:
    """A run from its first process to its last. Signals ask it to stop; a second Ctrl-C does not wait."""
    for env in config.env:  # A mistake in its data or rewards is told before anything starts.
        made_once(env, env.kwargs).close()
    folder = RunDir(path)
    folder.create()
    with cluster.connected(config if plays else config.without_rollouts()) as address:
        folder.refuse_owned()
        with closing(Line(config.run.name, f"process {os.getpid()} on {socket.gethostname()}")) as line:
            folder.claim(address, cluster.namespace())
            yield from _seen_through(config, folder, resume, make, line)


def _seen_through(
    config: RunConfig,
    folder: RunDir,
    resume: str,
    make: Callable[[RunConfig, RunDir, Start, Progress, StopRequest, Line], R],
    line: Line,
) -> Iterator[R]:
    progress = Progress(folder.path / "status.json", folder.logs / "trainer.log", config.run.steps)
    start = choose_start(folder, resume, progress.say)
    folder.config.write_text(resolved(config).to_toml(), encoding="utf-8")
    progress.start()
    stop = StopRequest(progress.say)
    try:
        with stop.listening():
            run = make(config, folder, start, progress, stop, line)
            try:
                yield run
            finally:
                run.close()
    finally:
        progress.stop()


def resolved(config: RunConfig) -> RunConfig:
    """As it is written beside the run: files and folders by their absolute paths, readable from any other folder."""
    folder, template = Path(config.model.path), config.model.chat_template
    absolute = {
        "path": str(folder.resolve()) if folder.is_dir() else config.model.path,
        "chat_template": str(Path(template).resolve()) if template is not None else None,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=absolute)})
