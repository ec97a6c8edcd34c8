"""The control of a run: what may be asked of it, how it is found, and that a name means one run."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import ray

from rollcast.control import Control, Line, Wishes, answer, find, name_of, running
from rollcast.errors import UsageError
from rollcast.weights import StoreHandle
from rollcast_learners.types import Weights

STORE = StoreHandle({}, ())


def told(**status: object) -> Control:
    control = Control("first", "process 1 on here")
    asyncio.run(control.say({"step": 3, **status}))
    return control


def weights(version: int) -> Weights:
    return Weights("full", version, (), (), "node", "/folder", None)


def test_wishes_are_noted_until_the_trainer_hears_them() -> None:
    control = told(most_workers=4)
    assert asyncio.run(control.ask(workers=4)) == Wishes(workers=4)
    asyncio.run(control.ask(paused=True))
    assert asyncio.run(control.say({"step": 4, "most_workers": 4})) == Wishes(workers=4, paused=True)
    assert asyncio.run(control.ask(workers=None, paused=False, stop=True)) == Wishes(stop=True)
    assert asyncio.run(control.status())["step"] == 4


@pytest.mark.parametrize("wanted", [-1, 5, 10**30, 1.5, "2", True])
def test_a_fleet_that_cannot_be_is_refused_with_what_can(wanted: object) -> None:
    control = told(most_workers=4)
    with pytest.raises(UsageError, match="0 to 4") as refused:
        asyncio.run(control.ask(paused=True, workers=wanted))
    assert repr(wanted) in refused.value.what
    assert asyncio.run(control.say({})) == Wishes(), "nothing of a refused wish counts"


@pytest.mark.parametrize("wish", [{"paused": "yes"}, {"stop": False}, {"steps": 3}])
def test_other_wishes_are_refused_by_name(wish: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wish))):
        asyncio.run(told().ask(**wish))


def test_a_run_that_plays_nothing_is_not_scaled() -> None:
    with pytest.raises(UsageError, match="no rollout workers"):
        asyncio.run(told(most_workers=0).ask(workers=1))


def test_whoever_waits_for_a_newer_policy_gets_it_when_it_is_announced() -> None:
    async def story() -> None:
        control = Control("first", "process 1 on here")
        assert await control.newest(-1, 0.01) is None
        waiting = asyncio.ensure_future(control.newest(0, 10))
        await control.announce(weights(0), STORE)
        await asyncio.sleep(0.01)
        assert not waiting.done(), "version 0 is not above 0"
        await control.announce(weights(1), STORE)
        found = await waiting
        assert found is not None and found[0].version == 1
        assert (await control.status())["policy_version"] == 1

    asyncio.run(story())


# ---- as an actor


@pytest.fixture
def line(ray_cluster: str) -> Iterator[Line]:
    with closing(Line("named", "process 1 on here")) as line:
        yield line


def heard(line: Line, wishes: Wishes) -> None:
    deadline = time.monotonic() + 20
    while line.say({"step": 1, "most_workers": 2}) != wishes:
        assert time.monotonic() < deadline, "it never heard"
        time.sleep(0.05)


@pytest.mark.ray
def test_a_trainer_hears_what_was_asked_by_name(line: Line, ray_cluster: str) -> None:
    heard(line, Wishes())
    found = find("named", ray_cluster)
    assert answer(found.ask.remote(workers=2), "named") == Wishes(workers=2)
    with pytest.raises(UsageError, match="0 to 2"):
        answer(found.ask.remote(workers=3), "named")
    heard(line, Wishes(workers=2))
    assert "named" in running(ray_cluster)
    with pytest.raises(UsageError, match=r"live there: .*named"):
        find("nameless")


@pytest.mark.ray
def test_a_second_trainer_of_that_name_is_refused_and_a_later_one_is_not(line: Line) -> None:
    with pytest.raises(UsageError, match="being trained already") as refused:
        Line("named", "process 2 on there", name_frees_s=0.5)
    assert "process 1 on here" in refused.value.why
    line.close()
    Line("named", "process 3 on there")


def sigkill(actor: Any) -> None:
    os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.parametrize("end", [ray.kill, sigkill])
def test_a_control_that_died_is_made_again_and_knows_what_it_knew(line: Line, end: Callable[[Any], None]) -> None:
    line.announce(weights(7), STORE)
    asked = find("named")
    answer(asked.ask.remote(paused=True), "named")
    heard(line, Wishes(paused=True))
    end(asked)
    with pytest.raises(UsageError, match="ended"):
        answer(asked.owner.remote(), "named")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert line.say({"step": 2}) == Wishes(paused=True)
        with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
            status = ray.get(ray.get_actor(name_of("named")).status.remote())
            if status.get("step") == 2 and status["policy_version"] == 7:
                return
        time.sleep(0.1)
    pytest.fail("no control came back")
