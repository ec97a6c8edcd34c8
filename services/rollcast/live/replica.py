"""One replica of the live policy: an engine with the newest policy, one with the best, and answers from either.

Owns: following the run without a pause in answering, which version is resident, and one answer from first token to
last. A plain class; `app.py` makes Ray Serve run several. Does not know HTTP, keys, or what OpenAI's clients expect.

The best policy has an engine of its own, started when there is one: the engine of the newest goes on to the next
version, and a best one must stay. What is sampled while an update is unproved leaves only once its probe has passed.
Where rollout workers answer (`shared.py`) there is no engine here, and the newest policy alone is resident.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from rollcast.chat import ChatCodec
from rollcast.intake import Intake, WeightsRefused
from rollcast.live.shared import Crew
from rollcast.live.shelf import Shelf
from rollcast.live.sources import Published, Source, pull_from_folder
from rollcast.live.texts import GrowingText
from rollcast.live.versions import Alias, NoSuchPolicy, Releases, aliases, engine_for
from rollcast.sampler import Delta, Drawing, Sampler, spans_of
from rollcast_learners.types import FinishReason, VersionSpan

WAIT_S = 10.0
SHELF_EVERY_S = 0.5

StartEngine = Callable[[Alias], Awaitable[Sampler]]


@dataclass(frozen=True)
class Piece:
    """What one answer grew by. The last one has `finish_reason`, and the spans of the whole answer."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
    version: int = -1
    """That of its last token."""
    finish_reason: FinishReason | None = None
    spans: tuple[VersionSpan, ...] = ()


@dataclass
class Counts:
    """What a replica has done, for whoever watches it."""

    answering: int = 0
    answered: int = 0
    cut: int = 0
    """Answers whose reader left before the end."""
    loads: int = 0
    load_s: float = 0.0
    """Of the last update: pause and load."""
    refusals: list[str] = field(default_factory=list)


class Replica:
    """Answers while it follows its run. All coroutines run on one event loop."""

    def __init__(
        self,
        codec: ChatCodec,
        start_engine: StartEngine,
        source: Source | None,
        shelf: Shelf | None,
        probe_max_gap: float,
        crew: Crew | None = None,
    ) -> None:
        """Without a `source` the policy is what the engine started from; without a `shelf` none is the best one.

        With a `crew` that answers, no engine is started; it is followed, and nothing else.
        """
        self.codec = codec
        self.source = source
        self.shelf = shelf
        self.releases = Releases()
        self.counts = Counts()
        self.loaded_at = time.time()
        self._start_engine = start_engine
        self._max_gap = probe_max_gap
        self._crew = crew
        self._engines: dict[Alias, Intake] = {}
        self._newest: Published | None = None
        self._choosing = asyncio.Lock()
        self._serial = 0

    # ---- coming and going

    async def start(self) -> None:
        """Starts an engine and takes in the newest policy; returns once both are there."""
        if self._crew is not None:
            return await self._crew.join()
        engine = await self._start("latest")
        if self.source is None:
            engine.trusted.set()
            return
        while not engine.trusted.is_set():
            await self._follow_once(engine)
        await self.choose()

    async def follow(self) -> None:
        """Goes on taking in what is published and what is chosen. Raises `EngineDied` when an engine is lost."""
        async with asyncio.TaskGroup() as tasks:
            if self._crew is not None:
                tasks.create_task(self._crew.follow(self._renewed))
            if self.source is not None:
                tasks.create_task(self._follow_newest())
            if self.shelf is not None:
                tasks.create_task(self._follow_shelf())

    async def alive(self) -> bool:
        """Whether every engine still answers."""
        return all([await engine.sampler.alive() for engine in self._engines.values()])

    async def close(self) -> None:
        """Ends the engines."""
        for engine in self._engines.values():
            await engine.sampler.close()

    async def _start(self, alias: Alias) -> Intake:
        self._engines[alias] = Intake(await self._start_engine(alias), self._max_gap)
        return self._engines[alias]

    # ---- versions

    @property
    def resident(self) -> dict[str, int]:
        """Version by name: `latest`, `best` where there is one, `candidate` where the two differ."""
        latest = self._latest
        best = self._engines.get("best")
        if best is not None and best.trusted.is_set():
            return aliases(latest, best.version)
        return aliases(latest, latest if self.releases.best == latest else None)

    @property
    def _latest(self) -> int:
        return self._engines["latest"].version if self._crew is None else self._crew.version

    def engine_for(self, asked: str, draw: float) -> Alias:
        """Which engine answers to a resident alias or version; `draw`, uniform in [0, 1), decides about the canary."""
        alias = engine_for(asked, self.resident, self.releases.canary, draw)
        return alias if alias in self._engines else "latest"

    async def promote(self, version: int | None = None) -> Releases:
        """Makes a resident version the best one; without a number the newest. Raises `NoSuchPolicy`."""
        shelf, newest = self._shelf_or_refuse(), self._newest
        latest = self._engines["latest"].version
        if version is not None and version not in self.resident.values():
            names = ", ".join(str(known) for known in sorted(set(self.resident.values())))
            raise NoSuchPolicy(f"version {version} is not resident; {names} can be promoted")
        if version in (None, latest) and self.releases.best != latest:
            if newest is None or newest.weights.version != latest:
                raise NoSuchPolicy("a newer policy is being taken in: ask again")
            await self._put_on(shelf, newest)
        await self.choose()
        return self.releases

    async def rollback(self, version: int | None = None) -> Releases:
        """Back to the best policy of before. Raises `NoSuchPolicy`."""
        shelf = self._shelf_or_refuse()
        await asyncio.to_thread(shelf.change, lambda now: now.rollback(version))
        await self.choose()
        return self.releases

    async def set_canary(self, share: float) -> Releases:
        """The share of what is asked of the best policy that the newest answers."""
        shelf = self._shelf_or_refuse()
        self.releases = await asyncio.to_thread(shelf.change, lambda now: now.with_canary(share))
        return self.releases

    async def choose(self) -> None:
        """Acts upon what is chosen by now: the engine of the best policy holds it when this returns."""
        if self.shelf is None:
            return
        async with self._choosing:
            self.releases = await asyncio.to_thread(self.shelf.look)
            best = self.releases.best
            # Until the two part for the first time, one engine is both.
            if best is not None and ("best" in self._engines or best != self._engines["latest"].version):
                await self._load_best(self.shelf, best)

    async def _load_best(self, shelf: Shelf, version: int) -> None:
        engine = self._engines.get("best") or await self._start("best")
        if engine.version != version:
            weights = await asyncio.to_thread(shelf.published, version)
            await self._take(engine, Published(weights, pull_from_folder), backwards=True)

    async def _put_on(self, shelf: Shelf, newest: Published) -> None:
        try:
            folder = await newest.pull(newest.weights)
            await asyncio.to_thread(shelf.promote, newest.weights, folder)
        except WeightsRefused as refusal:
            raise NoSuchPolicy(f"{refusal}: ask again") from refusal
        finally:
            await newest.done()

    def _shelf_or_refuse(self) -> Shelf:
        if self.shelf is None:
            raise NoSuchPolicy("one policy is served here, and nothing can be chosen")
        return self.shelf

    # ---- following

    async def _follow_newest(self) -> None:
        while True:
            await self._follow_once(self._engines["latest"])

    async def _follow_once(self, engine: Intake) -> None:
        assert self.source is not None, "a replica with one policy follows nothing"
        found = await self.source.newest(engine.version, WAIT_S)
        if found is None:
            return
        if self.shelf is not None and "best" not in self._engines and self.releases.best == engine.version >= 0:
            # The one engine is about to leave the best policy, which must stay resident.
            async with self._choosing:
                await self._load_best(self.shelf, engine.version)
        await self._take(engine, found)
        if engine.version == found.weights.version:
            self._newest = found
        else:
            await asyncio.sleep(SHELF_EVERY_S)  # It was refused, and will be found again.

    async def _follow_shelf(self) -> None:
        while True:
            await asyncio.sleep(SHELF_EVERY_S)
            await self.choose()

    async def _take(self, engine: Intake, found: Published, backwards: bool = False) -> None:
        try:
            loaded = await engine.load(found.weights, found.pull, backwards)
        finally:
            await found.done()
        if loaded.refused is not None:
            self.counts.refusals.append(loaded.refused)
            del self.counts.refusals[:-10]
        else:
            self.counts.load_s = loaded.pause_s + loaded.load_s
            self._renewed()

    def _renewed(self) -> None:
        """One of the policies is another one."""
        self.counts.loads += 1
        self.loaded_at = time.time()

    # ---- answering

    async def answer(
        self, alias: Alias, prompt_ids: Sequence[int], drawing: Drawing, stops: Sequence[str] = ()
    ) -> AsyncIterator[Piece]:
        """One answer as it grows. Closing the iterator ends it in the engine too."""
        engine = self._crew or self._engines[alias]
        self._serial += 1
        text, told = GrowingText(self.codec.answer, stops), _Told()
        self.counts.answering += 1
        whole = False
        try:
            deltas = engine.stream(prompt_ids, drawing, f"{alias}-{self._serial}-{time.time_ns()}")
            async with aclosing(deltas):  # type: ignore[type-var]
                async for delta in deltas:
                    piece = told.add(delta, text)
                    whole = piece.finish_reason is not None
                    yield piece
                    if whole:
                        return
        finally:
            self.counts.answering -= 1
            self.counts.answered += whole
            self.counts.cut += not whole


class _Told:
    """What one answer has told so far."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def add(self, delta: Delta, text: GrowingText) -> Piece:
        """The piece that a delta makes: up to the token that completes a stop text, if one does."""
        new = ""
        used = 0
        while used < len(delta.token_ids) and not text.ended:
            new += text.add(delta.token_ids[used])
            used += 1
        self.versions += delta.versions[:used]
        reason: FinishReason | None = "stop" if text.ended else delta.finish_reason
        spans: tuple[VersionSpan, ...] = ()
        if reason is not None:
            new += text.finish()
            known = delta.spans is not None and delta.spans and delta.spans[-1].end == len(self.versions)
            spans = delta.spans if known and delta.spans else spans_of(self.versions)
        return Piece(
            new,
            delta.token_ids[:used],
            delta.logprobs[:used],
            delta.alternatives[:used],
            spans[-1].version if spans else (self.versions[-1] if self.versions else -1),
            reason,
            spans,
        )
