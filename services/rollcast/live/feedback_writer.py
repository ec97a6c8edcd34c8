"""The one writer of the feedback database: answers come in and never wait, feedback waits until it is kept.

Owns: the queue between replicas and the database, its bound, batching, and the thread in which the database is used.
Does not know tables (`feedback_store.py`) or HTTP. A plain class: `feedback_actor.py` makes an actor of
it.

A database that fails holds up nothing: answers wait in the queue, up to `max_waiting`, and the oldest are dropped and
counted beyond that; who gives feedback is told that it cannot be kept now.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from rollcast.live.feedback import FeedbackReceipt, FeedbackRequest, ServedAnswer, unavailable
from rollcast.live.feedback_store import FeedbackStore
from rollcast.live.feedback_tables import open_to_write
from rollcast.live.openai_errors import ApiError

T = TypeVar("T")
log = logging.getLogger(__name__)

ARRIVAL_S = (0.05, 0.25, 0.7)
"""Feedback can overtake the answer it speaks of: how long such an answer is waited for, by try."""


class FeedbackWriter:
    """Made anywhere, used in one event loop, and closed there: what waits is then written.

    Raises `RollcastError` when the database cannot be opened.
    """

    def __init__(
        self,
        url: str,
        keep_days: float,
        max_mib: float,
        batch: int = 256,
        every_s: float = 0.5,
        max_waiting: int = 10_000,
        prune_every_s: float = 600.0,
    ) -> None:
        self.batch, self.every_s, self.max_waiting, self.prune_every_s = batch, every_s, max_waiting, prune_every_s
        self.written = self.dropped = self.pruned = 0
        self.error: str | None = None
        """Why the last write failed; None after one that did not."""
        self._waiting: deque[ServedAnswer] = deque()
        self._pruned_at = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self._store = self._thread.submit(lambda: FeedbackStore(open_to_write(url), keep_days, max_mib)).result()
        self._writing = asyncio.Lock()
        self._filled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def record(self, answers: Sequence[ServedAnswer]) -> None:
        """Takes answers that were served; they are written soon."""
        self._begin()
        self._waiting.extend(answers)
        while len(self._waiting) > self.max_waiting:
            self._waiting.popleft()
            self.dropped += 1
        if len(self._waiting) >= self.batch:
            self._filled.set()

    async def give(self, request: FeedbackRequest, key: str = "", admin: bool = False) -> FeedbackReceipt:
        """Keeps feedback on an answer of `key`, or with `admin` of anybody. Raises `ApiError`."""
        for wait in (*ARRIVAL_S, None):
            await self._flush()
            try:
                return await self._in_thread(partial(self._store.give, request, key, admin, time.time()))
            except ApiError as refused:
                if refused.status != 404 or wait is None:
                    raise
                await asyncio.sleep(wait)
            except SQLAlchemyError as error:
                self._failed(error)
                raise unavailable(self.error or "") from error
        raise AssertionError("the last try returns or raises")

    async def figures(self) -> dict[str, int | str | None]:
        """Answers written, waiting, dropped because the database failed for long, and pruned; and what failed last."""
        return {
            "written": self.written,
            "waiting": len(self._waiting),
            "dropped": self.dropped,
            "pruned": self.pruned,
            "error": self.error,
        }

    async def close(self) -> None:
        """Writes what waits, and closes the database."""
        if self._task is not None:
            async with self._writing:  # Within a batch it would be written, and not counted.
                self._task.cancel()
            await asyncio.wait([self._task])
        await self._flush()
        await self._in_thread(self._store.close)
        self._thread.shutdown()

    def _begin(self) -> None:
        # Not in the constructor: Ray runs that outside the event loop.
        if self._task is None:
            self._task = asyncio.create_task(self._write_for_ever())

    async def _write_for_ever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), self.every_s)
            self._filled.clear()
            if await self._flush() and self._prune_is_due():
                await self._prune()

    async def _flush(self) -> bool:
        """Writes all that waits, batch by batch; False when the database does not take it: it then waits on."""
        async with self._writing:
            while self._waiting:
                served = [self._waiting[place] for place in range(min(self.batch, len(self._waiting)))]
                dropped = self.dropped
                try:
                    self.written += await self._in_thread(partial(self._store.add, served))
                except SQLAlchemyError as error:
                    self._failed(error)
                    return False
                # What was dropped meanwhile was the head of this batch.
                for _ in range(max(0, len(served) - (self.dropped - dropped))):
                    self._waiting.popleft()
                self.error = None
        return True

    def _prune_is_due(self) -> bool:
        return self._store.full or time.monotonic() - self._pruned_at > self.prune_every_s

    async def _prune(self) -> None:
        self._pruned_at = time.monotonic()
        try:
            self.pruned += await self._in_thread(partial(self._store.prune, time.time()))
        except SQLAlchemyError as error:
            self._failed(error)

    def _failed(self, error: SQLAlchemyError) -> None:
        # The statement and its values are left out: they hold what users said.
        said = str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines()
        if self.error is None:
            log.warning("feedback: the database fails (%s); answers wait in memory", said[0])
        self.error = said[0]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
