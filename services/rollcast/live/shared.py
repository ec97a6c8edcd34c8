"""The live policy without an engine of its own: the run's rollout workers answer (`serve.mode = "shared"`).

Owns: knowing who plays, whom to ask next, and going on with an answer whose worker is gone. Does not know HTTP, text,
weights, or how a worker answers.

What a worker samples here is not a rollout: the run's ledger, buffer and figures know nothing of it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace

import ray
from ray.exceptions import RayActorError

from rollcast.control import Member
from rollcast.live.sources import LOOK_EVERY_S, RunControl
from rollcast.sampler import Delta, Drawing, EngineDied

WAIT_S = 10.0
NOBODY_S = 10.0
"""A question is kept for so long while the run has no worker: one that died may be replaced."""
LOST = (RayActorError, EngineDied)
"""A worker that is dead, and one whose engine is: it exits in a moment."""


class Crew:
    """The rollout workers of a run while it trains, on one event loop."""

    def __init__(self, control: RunControl, slots: int, nobody_s: float = NOBODY_S) -> None:
        """Each worker is given at most `slots` answers at a time."""
        self.version = -1
        """The newest that a worker holds, or held."""
        self._control = control
        self._slots = slots
        self._nobody_s = nobody_s
        self._members: tuple[Member, ...] = ()
        self._gone: set[int] = set()
        """Workers that were found dead, which the run may not have noticed yet."""
        self._seen = -1
        self._busy: Counter[int] = Counter()
        self._changed = asyncio.Event()

    async def join(self) -> None:
        """Returns once a worker holds a policy."""
        while self.version < 0:
            await self._look()

    async def follow(self, renewed: Callable[[], None]) -> None:
        """Goes on hearing who plays; `renewed` is called when the newest policy is another one."""
        while True:
            before = self.version
            await self._look()
            if self.version != before:
                renewed()

    async def stream(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        """As `Sampler.stream`. When a worker dies or leaves, another one goes on behind the tokens that were told.

        Raises `EngineDied` when there has been no worker for a while.
        """
        said: list[int] = []
        while True:
            left = replace(drawing, max_new_tokens=drawing.max_new_tokens - len(said))
            member = await self._free()
            with self._at_work(member):
                try:
                    deltas = _answer_of(member, [*token_ids, *said], left, f"{request_id}-{len(said)}")
                    async with aclosing(deltas):  # type: ignore[type-var]
                        async for delta in deltas:
                            said += delta.token_ids
                            yield delta
                    return
                except LOST:
                    self._gone.add(member.worker)

    async def _look(self) -> None:
        """Hears of a change, or that there is none for a while."""
        control = self._control.find()
        if control is None:
            self._know(())
            await asyncio.sleep(LOOK_EVERY_S)
            return
        try:
            self._seen, members = await control.crew.remote(self._seen, WAIT_S)
        except RayActorError:  # The trainer is gone, or only its control, which then is soon another one.
            self._control.lost()
            self._seen, members = -1, ()
            self._gone.clear()  # Another trainer counts its workers anew.
        self._know(members)

    def _know(self, members: tuple[Member, ...]) -> None:
        self._members = members
        self.version = max((member.version for member in members), default=self.version)
        self._changed.set()

    async def _free(self) -> Member:
        """The least busy of the workers that hold the newest policy, once one of them has room."""
        while True:
            able = [m for m in self._members if m.version == self.version and m.worker not in self._gone]
            free = [member for member in able if self._busy[member.worker] < self._slots]
            if free:
                return min(free, key=lambda member: self._busy[member.worker])
            self._changed.clear()
            try:
                async with asyncio.timeout(None if able else self._nobody_s):
                    await self._changed.wait()
            except TimeoutError:
                raise EngineDied("The run has no rollout worker that could answer.") from None

    @contextmanager
    def _at_work(self, member: Member) -> Iterator[None]:
        self._busy[member.worker] += 1
        try:
            yield
        finally:
            self._busy[member.worker] -= 1
            self._changed.set()


async def _answer_of(
    member: Member, token_ids: Sequence[int], drawing: Drawing, request_id: str
) -> AsyncIterator[Delta]:
    """One worker's answer; closing the iterator ends it there too."""
    whole = False
    references = member.actor.answer.options(num_returns="streaming").remote(token_ids, drawing, request_id)
    try:
        async for reference in references:
            delta: Delta = await reference
            whole = delta.finish_reason is not None
            yield delta
    finally:
        if not whole:
            ray.cancel(references)
