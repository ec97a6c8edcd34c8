"""Environments that raise, hang or return nonsense: one named failure each, and the event loop goes on."""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
import pytest

import faulty_envs
from rollcast.environments import Environment, EnvironmentFailed, EnvironmentPool, StepResult
from rollcast_learners.types import Prompt

PROMPT = Prompt("0.1.0", "0", "faulty/Turns-v0", 5)


def broken(at: str, how: str, **more: Any) -> Prompt:
    return Prompt("0.1.0", "0", "faulty/Broken-v0", 5, {"at": at, "how": how, **more})


def failure(prompt: Prompt, timeout_s: float = 5.0) -> str:
    """Makes, resets and steps; returns what went wrong."""

    async def go() -> str:
        pool = EnvironmentPool(timeout_s)
        environment = None
        with pytest.raises(EnvironmentFailed) as caught:
            environment = await pool.acquire(prompt)
            await environment.reset(prompt.seed, None)
            await environment.step("anything")
        if environment is not None:
            environment.close()
        return str(caught.value)

    return asyncio.run(go())


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def threads_since(before: set[threading.Thread]) -> int:
    return sum(thread.name == "environment" for thread in set(threading.enumerate()) - before)


@pytest.mark.parametrize("at", ["make", "reset", "step"])
@pytest.mark.parametrize("how", faulty_envs.RAISED)
def test_whatever_it_raises_is_named(at: str, how: str) -> None:
    started = time.monotonic()
    why = failure(broken(at, how), timeout_s=30.0)
    error = faulty_envs.RAISED[how]
    assert why == f"faulty/Broken-v0: {at} raised {type(error).__name__}: {error}"
    assert time.monotonic() - started < 10, "it was told at once, not by the deadline"


@pytest.mark.parametrize("how", faulty_envs.RESETS)
def test_nonsense_from_reset_is_named(how: str) -> None:
    assert failure(broken("reset", how)).startswith("faulty/Broken-v0: reset returned ")


@pytest.mark.parametrize("how", faulty_envs.STEPS)
def test_nonsense_from_step_is_named(how: str) -> None:
    why = failure(broken("step", how))
    assert why.startswith("faulty/Broken-v0: step returned ") and "; expected " in why
    assert len(why) < 250


def test_the_message_shows_the_value_and_what_was_expected() -> None:
    assert failure(broken("step", "reward NaN")) == (
        "faulty/Broken-v0: step returned nan; expected a finite number as the reward"
    )
    assert "system_prompt" in failure(broken("make", "system prompt 7"))


def test_an_unknown_environment_is_named() -> None:
    assert "nowhere/Nothing-v0: make raised" in failure(Prompt("0", "0", "nowhere/Nothing-v0", 1))


def test_gymnasium_s_own_checker_fails_the_same_way() -> None:
    gymnasium.register("faulty/Checked-v0", entry_point=faulty_envs.Broken)
    kwargs = {"at": "reset", "how": "observation None"}
    assert "faulty/Checked-v0: " in failure(Prompt("0", "0", "faulty/Checked-v0", 5, kwargs))


@pytest.mark.parametrize("at", ["make", "reset", "step"])
def test_a_hang_ends_at_the_deadline(at: str) -> None:
    assert failure(broken(at, "hang"), 0.1) == f"faulty/Broken-v0: {at} did not return within 0.1 s"


def test_the_event_loop_goes_on_while_an_environment_hangs() -> None:
    async def go() -> tuple[int, StepResult]:
        pool = EnvironmentPool(0.5)
        hanging = await pool.acquire(broken("step", "hang", hang_s=1.0))
        good = await pool.acquire(PROMPT)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticker = asyncio.create_task(tick())
        late = asyncio.create_task(hanging.step("x"))
        await good.reset(1, None)
        result = await good.step("x")
        assert not late.done()
        with pytest.raises(EnvironmentFailed):
            await late
        ticker.cancel()
        hanging.close()
        good.close()
        return ticks, result

    ticks, result = asyncio.run(go())
    assert ticks > 10
    assert result == StepResult("Question 1", 0.25, False, False, {})


def test_no_thread_stays_behind_once_a_call_returns() -> None:
    before = set(threading.enumerate())

    async def go() -> None:
        pool = EnvironmentPool(0.3)
        for how in ("error", "hang"):
            with pytest.raises(EnvironmentFailed):
                await pool.acquire(broken("make", how, hang_s=0.5))
        for at, how in [("reset", "hang"), ("close", "error"), ("close", "exit")]:
            environment = await pool.acquire(broken(at, how, hang_s=0.5))
            with suppress(EnvironmentFailed):
                await environment.reset(1, None)
            environment.close()
        pool.release(await pool.acquire(PROMPT))
        pool.close()

    asyncio.run(go())
    assert eventually(lambda: threads_since(before) == 0)


def test_good_environments_are_used_again_by_equal_prompts_only() -> None:
    async def go() -> None:
        pool = EnvironmentPool(5.0)
        first = await pool.acquire(PROMPT)
        second = await pool.acquire(PROMPT)
        assert first is not second
        pool.release(first)
        assert await pool.acquire(Prompt("9", "9", "faulty/Turns-v0", 8, {"end": "truncated"})) is not first
        assert await pool.acquire(Prompt("9", "9", "faulty/Turns-v0", 8)) is first
        for environment in (first, second):
            environment.close()

    asyncio.run(go())


def test_what_an_environment_returns_arrives_as_plain_types() -> None:
    async def go() -> None:
        environment = Environment("faulty/Turns-v0", {"rewards": (np.float32(0.5),)}, 5.0)
        await environment.open()
        assert environment.system_prompt == "Be brief."
        assert await environment.reset(3, {"a": 1}) == ("Question 0 of 3 {'a': 1}", {"kind": "opening"})
        result = await environment.step("x")
        assert type(result.reward) is float and math.isclose(result.reward, 0.5)
        assert result.terminated is True and result.truncated is False
        environment.close()

    asyncio.run(go())


def test_the_built_in_environments_are_registered() -> None:
    async def go() -> str:
        pool = EnvironmentPool(30.0)
        environment = await pool.acquire(Prompt("0", "0", "rollcast/QA-v0", 1, {"split": "validation"}))
        observation, _ = await environment.reset(1, {"index": 0})
        environment.close()
        return observation

    assert asyncio.run(go()).endswith(("?", "."))
