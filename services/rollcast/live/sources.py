"""Where the live policy finds policies: with the trainer while it lives, else in the run's folder.

Owns: asking for what is newer, and how its files are brought here. Does not know engines, or which policy is best.

The store of a live trainer has every policy as soon as it is published. The run folder has those of its checkpoints
(`weights/vN`), and has them for ever: that is how a policy is served on when its trainer is gone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rollcast.errors import RunFailed
from rollcast.export import newest_published
from rollcast.intake import Pull, WeightsRefused
from rollcast.rundir import RunDir
from rollcast_learners.types import Weights

LOOK_EVERY_S = 0.5
FIND_EVERY_S = 5.0
READ_WITHIN_S = 300.0
"""The store forgets a replica that has not read a policy after so long: it may have been killed."""


async def nothing() -> None:
    """What is to be done after files of the run folder were read."""


@dataclass(frozen=True)
class Published:
    """A policy that can be taken in: `pull` brings its files, `done` says that they have been read."""

    weights: Weights
    pull: Pull
    done: Callable[[], Awaitable[None]] = nothing


class Source(Protocol):
    """Policies of one run, newest first."""

    async def newest(self, above: int, wait_s: float) -> Published | None:
        """The newest policy once its version is above `above`; None when it is not within `wait_s` seconds."""


async def pull_from_folder(weights: Weights) -> str:
    """Validates the files of a policy where they lie. Raises `WeightsRefused`."""
    from rollcast_learners.segments import InvalidWeights, spec_of, validate

    specs = [spec_of(entry) for entry in weights.manifest]
    try:
        await asyncio.to_thread(validate, weights, weights.folder, specs)
    except (InvalidWeights, OSError) as error:
        raise WeightsRefused(f"version {weights.version} in {weights.folder}: {error}") from error
    return weights.folder


class RunFolder:
    """What lies published in a run folder."""

    def __init__(self, run: RunDir, look_every_s: float = LOOK_EVERY_S) -> None:
        self.run = run
        self.look_every_s = look_every_s

    async def newest(self, above: int, wait_s: float) -> Published | None:
        until = time.monotonic() + wait_s
        while True:
            found = await asyncio.to_thread(self._look)
            if found is not None and found.version > above:
                return Published(found, pull_from_folder)
            if time.monotonic() >= until:
                return None
            await asyncio.sleep(self.look_every_s)

    def _look(self) -> Weights | None:
        try:
            return newest_published(self.run)
        except (OSError, RunFailed):  # The trainer removes the one before in this very moment.
            return None


class RunControl:
    """The control of a run, which lives as long as its trainer: looked for now and then."""

    def __init__(self, run: str, namespace: str) -> None:
        self.run, self.namespace = run, namespace
        self._control: Any = None
        self._looked = float("-inf")

    def find(self) -> Any:
        """Its handle, or None where there is no trainer."""
        import ray

        from rollcast.control import name_of

        if self._control is None and time.monotonic() - self._looked > FIND_EVERY_S:
            self._looked = time.monotonic()
            try:
                self._control = ray.get_actor(name_of(self.run), self.namespace)
            except ValueError:
                return None
        return self._control

    def lost(self) -> None:
        """It does not answer any more."""
        self._control = None


class Trainer:
    """What a live trainer publishes; without one, what lies in the run folder."""

    def __init__(self, run: RunDir, control: RunControl, reader: str) -> None:
        self.folder = RunFolder(run)
        self.control, self.reader = control, reader

    async def newest(self, above: int, wait_s: float) -> Published | None:
        from ray.exceptions import RayActorError

        control = self.control.find()
        if control is not None:
            try:
                found = await control.newest.remote(above, wait_s)
            except RayActorError:  # It died meanwhile.
                self.control.lost()
                control = found = None
            if found is not None and found[1].reaches_here:
                return self._of_store(*found)
        return await self.folder.newest(above, 0.0 if control is not None else min(wait_s, FIND_EVERY_S))

    def _of_store(self, weights: Weights, store: Any) -> Published:
        async def pull(wanted: Weights) -> str:
            folder: str = await store.pull(wanted, self.reader, READ_WITHIN_S)
            return folder

        async def done() -> None:
            await store.release(weights.version, self.reader)

        return Published(weights, pull, done)
