"""How much the live policy takes on: sizes, rates, and how many at a time.

Owns: the limits as settings, the token buckets, and who waits, goes on or is turned away. Does not know HTTP, keys,
engines or Serve. Times are seconds of one clock; nothing here sleeps.

Limits count in the process that holds them. With several of them each has its own: share them out with `shared_by`.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from rollcast.live.openai_errors import ApiError
from rollcast.section import AtLeastOne, NotNegative, Positive, Section

MOST_CALLERS = 10_000
ROUNDING = 1e-9
"""Part of a token: whoever waits as long as told finds it there, whatever floating point makes of it."""

Clock = Callable[[], float]
Leaving = Callable[[], Awaitable[None]]
"""Returns when the client has closed the connection."""


class ClientLeft(Exception):
    """The client closed the connection before it was answered."""


class Limits(Section):
    """What one server takes on before it refuses."""

    body_bytes: AtLeastOne = 1_000_000
    """Largest body of a request; a larger one is refused with 413, before it is read."""
    body_s: Positive = 10.0
    """Seconds in which a body must have come in; after that 408."""
    requests_per_s: Positive = 10.0
    """Requests a second of one key, on average; after that 429."""
    burst: AtLeastOne = 20
    """Requests that one key may send at once before its average counts."""
    tokens_per_minute: AtLeastOne = 50_000
    """Tokens a minute of one key, prompts and answers together, on average; after that 429."""
    concurrent: AtLeastOne = 32
    """Requests of one key at a time; after that 429."""
    ongoing: AtLeastOne = 64
    """Requests of all keys that are answered at a time; others wait."""
    queued: NotNegative = 128
    """Requests that may wait; after that 429."""
    queue_s: Positive = 30.0
    """Seconds that a request waits at most; after that 429."""

    def shared_by(self, processes: int) -> "Limits":
        """The part of each of several processes, so that all together take on about as much as one would."""
        part = {"requests_per_s": self.requests_per_s / processes}
        whole = ("burst", "tokens_per_minute", "concurrent", "ongoing", "queued")
        return self.model_copy(update=part | {name: math.ceil(getattr(self, name) / processes) for name in whole})


class TokenBucket:
    """Holds at most `size` tokens and gains `per_s` of them a second. It may go into debt, and then waits it out."""

    def __init__(self, per_s: float, size: float, now: float) -> None:
        self.per_s, self.size = per_s, size
        self._held, self._at = float(size), now

    def wait_s(self, wanted: float, now: float) -> float:
        """Seconds until `wanted` tokens are there; 0: now."""
        self._fill(now)
        missing = min(wanted, self.size) - self._held
        # A clock that went back has to come up to where it was before anything is gained.
        return missing / self.per_s + self._at - now if missing > ROUNDING else 0.0

    def spend(self, tokens: float, now: float) -> None:
        """Takes them out, whether or not they are there."""
        self._fill(now)
        self._held -= tokens

    def full(self, now: float) -> bool:
        """Whether it is as good as new."""
        return self.wait_s(self.size, now) <= 0

    def _fill(self, now: float) -> None:
        self._held = min(self.size, self._held + max(0.0, now - self._at) * self.per_s)
        self._at = max(now, self._at)


class Caller:
    """What one key has used of late."""

    def __init__(
        self, limits: Limits, clock: Clock, requests_per_s: float | None = None, concurrent: int | None = None
    ) -> None:
        rate = limits.requests_per_s if requests_per_s is None else requests_per_s
        now = clock()
        self._clock = clock
        self._requests = TokenBucket(rate, max(1.0, limits.burst * rate / limits.requests_per_s), now)
        self._tokens = TokenBucket(limits.tokens_per_minute / 60, limits.tokens_per_minute, now)
        self._most = limits.concurrent if concurrent is None else concurrent
        self.ongoing = 0

    def admit(self) -> None:
        """Counts one request. Raises `ApiError` (429) that says when to come again."""
        now = self._clock()
        if self.ongoing >= self._most:
            raise ApiError(429, f"this key has {self.ongoing} requests at work", None, "concurrency_limit", 1.0)
        if (wait := self._requests.wait_s(1, now)) > 0:
            raise ApiError(429, "this key sends requests too fast", None, "rate_limit_exceeded", wait)
        if (wait := self._tokens.wait_s(1, now)) > 0:
            raise ApiError(429, "this key has used its tokens of this minute", None, "token_limit_exceeded", wait)
        self._requests.spend(1, now)

    def spend(self, tokens: int) -> None:
        """Books what an answer took, prompt and answer together."""
        self._tokens.spend(tokens, self._clock())

    @property
    def idle(self) -> bool:
        """Whether forgetting this caller changes nothing."""
        now = self._clock()
        return not self.ongoing and self._requests.full(now) and self._tokens.full(now)


class Doorkeeper:
    """Lets requests in, makes them wait, or turns them away; one for each process, on one event loop."""

    def __init__(self, limits: Limits, clock: Clock = time.monotonic) -> None:
        self.limits = limits
        self.ongoing = 0
        self._clock = clock
        self._callers: dict[str, Caller] = {}
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    def caller(self, key: str, requests_per_s: float | None = None, concurrent: int | None = None) -> Caller:
        """The account of a key; its own limits count from the first time that it is seen."""
        if key not in self._callers:
            if len(self._callers) >= MOST_CALLERS:
                self._callers = {name: caller for name, caller in self._callers.items() if not caller.idle}
            self._callers[key] = Caller(self.limits, self._clock, requests_per_s, concurrent)
        return self._callers[key]

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        """The time in which a key has a request at work. Raises `ApiError` (429) when it has too many."""
        caller.admit()
        caller.ongoing += 1
        try:
            yield
        finally:
            caller.ongoing -= 1

    @asynccontextmanager
    async def turn(self, leaving: Leaving | None = None) -> AsyncIterator[None]:
        """The time in which a request is answered, after waiting for it.

        Raises `ApiError` (429) when turned away, `ClientLeft` when the client does not wait for its turn.
        """
        await self._wait_for_turn(leaving)
        try:
            yield
        finally:
            self._next()

    async def _wait_for_turn(self, leaving: Leaving | None) -> None:
        if self.ongoing < self.limits.ongoing:
            self.ongoing += 1
            return
        if len(self._waiters) >= self.limits.queued:
            raise ApiError(429, f"{len(self._waiters)} requests wait already", None, "queue_full", 1.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[turn] = None
        left = None if leaving is None else asyncio.ensure_future(leaving())
        came = False
        try:
            either = {turn} if left is None else {turn, left}
            await asyncio.wait(either, timeout=self.limits.queue_s, return_when=asyncio.FIRST_COMPLETED)
            came = turn.done()
            if not came and left is not None and left.done():
                raise ClientLeft
            if not came:
                raise ApiError(429, f"no turn within {self.limits.queue_s:g} s", None, "queue_timeout", 1.0)
        finally:
            if left is not None:
                left.cancel()
            self._waiters.pop(turn, None)
            if not came and turn.done():
                self._next()  # The turn came in the very moment in which the client left.

    def _next(self) -> None:
        """Hands the place over, so that `ongoing` never passes its limit."""
        while self._waiters:
            turn, _ = self._waiters.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                return
        self.ongoing -= 1
