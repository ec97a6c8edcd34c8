"""A run from its first process to its last: opened, asked to stop by signals, and closed whatever happened.

Owns: the order of opening and closing, how signals ask a run to stop, and what every loop asks of its run. Does not
know what is done in a step.
"""

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from rollcast import cluster, metrics
from rollcast.config import RunConfig
from rollcast.evaluate import made_once
from rollcast.progress import Progress
from rollcast.resume import Start, choose_start
from rollcast.rundir import RunDir


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal. SIGTERM and the first Ctrl-C ask; it may still be
    starting then. A second Ctrl-C interrupts."""

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
        self.signal = number
        self._say("stopping: the run saves a checkpoint first")


class Session(ABC):
    """What the loops of `train` and of `sft` have in common: where they stand, and whether they go on.

    `_build` makes the processes and gives each one's end to `_closers`, so that a run that fails half-way leaves none.
    """

    def __init__(self, config: RunConfig, folder: RunDir, start: Start, progress: Progress, stop: StopRequest) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.stop = stop
        self.step = self._saved_step = start.step
        self.watch = metrics.Stopwatch()
        self.writer = metrics.MetricsWriter(folder.metrics, folder.tensorboard if config.tracking.tensorboard else None)
        self._last_row = time.monotonic()
        self._closers = ExitStack()
        self._closers.callback(self.writer.close)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._build(start)
            undo.pop_all()

    @abstractmethod
    def _build(self, start: Start) -> None:
        """Everything alive of the run."""

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
    make: Callable[[RunConfig, RunDir, Start, Progress, StopRequest], R],
    plays: bool = True,
) -> Iterator[R]:
    """A run from its first process to its last. Signals ask it to stop; a second Ctrl-C does not wait."""
    for env in config.env:  # A mistake in its data or rewards is told before anything starts.
        made_once(env, env.kwargs).close()
    folder = RunDir(path)
    folder.create()
    with cluster.connected(config if plays else config.without_rollouts()) as address:
        folder.claim(address, cluster.NAMESPACE)
        progress = Progress(folder.path / "status.json", folder.logs / "trainer.log", config.run.steps)
        start = choose_start(folder, resume, progress.say)
        folder.config.write_text(resolved(config).to_toml(), encoding="utf-8")
        progress.start()
        stop = StopRequest(progress.say)
        try:
            with stop.listening():
                run = make(config, folder, start, progress, stop)
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
