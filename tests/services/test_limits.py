"""Limits of the live policy: rates, requests at a time, waiting and being turned away. Time is a number here."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from live_app import chat
from rollcast.live import limits as limits_module
from rollcast.live.gate import guard
from rollcast.live.limits import Caller, ClientLeft, Doorkeeper, Leaving, Limits, TokenBucket
from rollcast.live.openai_errors import ApiError
from rollcast.live.protocol import ChatRequest

CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(caller: Caller) -> ApiError | None:
    try:
        caller.admit()
    except ApiError as error:
        return error
    return None


def test_a_bucket_lets_its_average_through() -> None:
    bucket = TokenBucket(per_s=2, size=4, now=0)
    for _ in range(4):
        assert bucket.wait_s(1, 0) == 0
        bucket.spend(1, 0)
    assert bucket.wait_s(1, 0) == 0.5
    assert bucket.wait_s(1, 0.5) == 0
    bucket.spend(9, 0.5)
    assert bucket.wait_s(1, 0.5) == 4.5, "it may go into debt, and waits it out"
    assert bucket.wait_s(100, 1e6) == 0, "no more than the whole bucket is waited for"
    assert bucket.full(1e6)
    bucket.spend(1, 1e6)
    assert not bucket.full(1e6)


@given(
    per_s=st.floats(0.01, 100),
    size=st.floats(1, 100),
    steps=st.lists(st.tuples(st.floats(-1, 10), st.booleans()), max_size=50),
)
def test_whoever_waits_as_told_gets_in_and_nobody_gets_more(
    per_s: float, size: float, steps: list[tuple[float, bool]]
) -> None:
    """A clock that goes back now and then changes nothing."""
    bucket, now, spent, latest = TokenBucket(per_s, size, 0.0), 0.0, 0, 0.0
    for step, waits in steps:
        now += bucket.wait_s(1, now) + 1e-6 if waits else step
        latest = max(latest, now)
        if bucket.wait_s(1, now) == 0:
            bucket.spend(1, now)
            spent += 1
        elif waits:
            raise AssertionError(f"waited as told, and still {bucket.wait_s(1, now)}")
        assert spent <= size + per_s * latest + 1e-6


def test_a_key_s_burst_and_then_its_rate() -> None:
    clock = Clock()
    caller = Doorkeeper(Limits(requests_per_s=10, burst=20), clock).caller("a")
    assert [refusal(caller) for _ in range(20)] == [None] * 20
    refused = refusal(caller)
    assert refused is not None and (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "1"
    clock.now += 0.1
    assert refusal(caller) is None and refusal(caller) is not None


def test_a_key_s_tokens_are_booked_after_the_answer() -> None:
    clock = Clock()
    caller = Doorkeeper(Limits(tokens_per_minute=600), clock).caller("a")
    assert refusal(caller) is None
    caller.spend(1_200)
    refused = refusal(caller)
    assert refused is not None and refused.code == "token_limit_exceeded"
    assert refused.headers["retry-after"] == "61", "a minute of debt, and the first token after it"
    clock.now += 61
    assert refusal(caller) is None


def test_keys_do_not_share_their_limits() -> None:
    door = Doorkeeper(Limits(burst=1), Clock())
    assert refusal(door.caller("a")) is None
    assert refusal(door.caller("a")) is not None
    assert refusal(door.caller("b")) is None
    assert door.caller("a") is door.caller("a")


def test_requests_of_a_key_at_a_time() -> None:
    door = Doorkeeper(Limits(concurrent=2), Clock())
    caller = door.caller("a")
    with door.admit(caller), door.admit(caller):
        refused = refusal(caller)
        assert refused is not None and refused.code == "concurrency_limit"
    assert refusal(caller) is None
    with pytest.raises(RuntimeError), door.admit(caller):
        raise RuntimeError
    assert caller.ongoing == 0


def test_idle_keys_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "MOST_CALLERS", 3)
    clock = Clock()
    door = Doorkeeper(Limits(), clock)
    busy = door.caller("busy")
    with door.admit(busy):
        for name in "abcdef":
            door.caller(name)
        assert len(door._callers) <= 4 and door.caller("busy") is busy


def test_a_share_of_the_limits() -> None:
    share = Limits().shared_by(4)
    assert (share.requests_per_s, share.burst, share.ongoing, share.queued) == (2.5, 5, 16, 32)
    assert (share.body_bytes, share.queue_s) == (Limits().body_bytes, Limits().queue_s)
    assert Limits(burst=1).shared_by(8).burst == 1


# ---- turns


def test_turns_come_in_order_and_never_too_many() -> None:
    async def work() -> tuple[list[int], int, Doorkeeper]:
        door, order, most = Doorkeeper(Limits(ongoing=2, queued=8)), [], 0

        async def one(number: int) -> None:
            nonlocal most
            async with door.turn():
                order.append(number)
                most = max(most, door.ongoing)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(one(number) for number in range(10)))
        return order, most, door

    order, most, door = asyncio.run(work())
    assert (order, most, door.ongoing) == (list(range(10)), 2, 0)


def test_who_does_not_fit_into_the_queue_is_turned_away_at_once() -> None:
    async def work() -> list[Any]:
        door = Doorkeeper(Limits(ongoing=1, queued=2))

        async def one() -> None:
            async with door.turn():
                await asyncio.sleep(0.01)

        return await asyncio.gather(*(one() for _ in range(10)), return_exceptions=True)

    results = asyncio.run(work())
    assert results[:3] == [None] * 3
    assert [(e.status, e.code) for e in results[3:]] == [(429, "queue_full")] * 7


def test_who_waits_too_long_is_turned_away() -> None:
    async def work() -> None:
        door = Doorkeeper(Limits(ongoing=1, queue_s=0.01))
        async with door.turn():
            with pytest.raises(ApiError) as refused:
                async with door.turn():
                    raise AssertionError("there was no turn")
            assert refused.value.code == "queue_timeout"
        async with door.turn():
            assert door.ongoing == 1

    asyncio.run(work())


@pytest.mark.parametrize("moment", range(6))
def test_who_leaves_while_waiting_takes_no_place(moment: int) -> None:
    """Cancelled after so many steps of the loop: before, in the moment of, and after getting the turn."""

    async def work() -> int:
        door = Doorkeeper(Limits(ongoing=1))
        release = asyncio.Event()

        async def holder() -> None:
            async with door.turn():
                await release.wait()

        async def waiter() -> None:
            async with door.turn():
                await asyncio.sleep(60)

        held = asyncio.create_task(holder())
        await asyncio.sleep(0)
        waits = asyncio.create_task(waiter())
        await asyncio.sleep(0)
        release.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        waits.cancel()
        await asyncio.gather(held, waits, return_exceptions=True)
        async with asyncio.timeout(1):
            async with door.turn():
                return door.ongoing

    assert asyncio.run(work()) == 1


# ---- through the gate


def slow_app(limits: Limits, seconds: float) -> tuple[FastAPI, list[int]]:
    """An app whose answers take time; the list holds how many were being answered."""
    app, answering = FastAPI(), [0]

    @app.post(CHAT)
    async def answer(asked: ChatRequest) -> dict[str, int]:
        answering.append(answering[-1] + 1)
        await asyncio.sleep(seconds)
        answering.append(answering[-1] - 1)
        return {}

    @app.get("/v1/policy")
    async def policy() -> dict[str, int]:
        return {}

    guard(app, None, limits)
    return app, answering


def test_a_client_that_leaves_the_queue_is_not_waited_for() -> None:
    async def work() -> list[str]:
        door, diary, gone = Doorkeeper(Limits(ongoing=1, queued=1)), [], asyncio.Event()

        async def asks(name: str, leaving: Leaving | None = None) -> None:
            try:
                async with door.turn(leaving):
                    diary.append(name)
                    await asyncio.sleep(0.05)
            except ClientLeft:
                diary.append(f"{name} left")

        async def leaves() -> None:
            await gone.wait()

        first = asyncio.create_task(asks("first"))
        await asyncio.sleep(0)
        second = asyncio.create_task(asks("second", leaves))
        await asyncio.sleep(0.01)
        gone.set()
        await second
        await asyncio.gather(first, asks("third"))  # The queue has room for one.
        async with asyncio.timeout(1), door.turn():
            return [*diary, f"{door.ongoing} at work"]

    assert asyncio.run(work()) == ["first", "second left", "third", "1 at work"]


def test_a_burst_gets_answers_and_429_only_and_is_soon_over() -> None:
    limits = Limits(ongoing=4, queued=8, requests_per_s=1e6, burst=10**6, concurrent=1_000)
    app, answering = slow_app(limits, 0.02)

    async def burst() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            asking = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(120)]
            await asyncio.sleep(0.01)
            meanwhile = await client.get("/v1/policy")
            return await asyncio.gather(*asking), meanwhile, await client.post(CHAT, json=chat())

    responses, meanwhile, after = asyncio.run(burst())
    codes = [response.status_code for response in responses]
    assert codes.count(200) == 12 and codes.count(429) == 108
    assert all(int(r.headers["retry-after"]) >= 1 for r in responses if r.status_code == 429)
    assert max(answering) == 4 and meanwhile.status_code == after.status_code == 200


def test_a_stream_holds_its_turn_to_the_end() -> None:
    from starlette.responses import StreamingResponse

    app = FastAPI()

    @app.post(CHAT)
    async def answer(asked: ChatRequest) -> StreamingResponse:
        async def pieces() -> Any:
            for _ in range(5):
                await asyncio.sleep(0.005)
                yield b"data: {}\n\n"

        return StreamingResponse(pieces())

    guard(app, None, Limits(ongoing=1, queued=0))

    async def two() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            both = await asyncio.gather(client.post(CHAT, json=chat()), client.post(CHAT, json=chat()))
            return [response.status_code for response in both] + [(await client.post(CHAT, json=chat())).status_code]

    assert asyncio.run(two()) == [200, 429, 200]
