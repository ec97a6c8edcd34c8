"""Answers from the rollout workers' engines: who is asked, who waits, and what happens where nobody plays."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

import pytest
import ray

from rollcast.control import Line, Member
from rollcast.live.shared import Crew
from rollcast.live.sources import RunControl
from rollcast.sampler import Delta, Drawing, EngineDied, ScriptedSampler

pytestmark = pytest.mark.ray
GREEDY = Drawing(0.0, 8)


def counts(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
    """Goes on counting from the last token of the prompt."""
    return [token_ids[-1] + place for place in range(1, 200)]


class Worker:
    """As much of a rollout worker as answers; `answering` says how many it is at."""

    def __init__(self, version: int) -> None:
        self.sampler = ScriptedSampler(eos_token_id=-1, script=counts, seconds_per_token=0.01)
        self.sampler.version = version
        self.now = 0

    async def answer(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        self.now += 1
        try:
            async for delta in self.sampler.stream(token_ids, drawing, request_id):
                yield delta
        finally:
            self.now -= 1

    async def answering(self) -> int:
        return self.now


@pytest.fixture
def line(ray_cluster: str) -> Iterator[Line]:
    with closing(Line("shares", "this test")) as line:
        yield line


@pytest.fixture
def workers(ray_cluster: str) -> Iterator[list[Member]]:
    """Two that hold version 5, and one that is behind."""
    actors = [ray.remote(Worker).options(num_cpus=0, max_concurrency=100).remote(version) for version in (5, 5, 4)]
    ray.get([actor.answering.remote() for actor in actors])
    yield [Member(number, (5, 5, 4)[number], actor) for number, actor in enumerate(actors)]
    for actor in actors:
        ray.kill(actor)


def crew_of(line: Line, namespace: str, slots: int = 1) -> Crew:
    return Crew(RunControl(line.run, namespace), slots, nobody_s=0.3)


async def heard(crew: Crew, drawing: Drawing = GREEDY) -> list[Delta]:
    return [delta async for delta in crew.stream([10], drawing, "asked")]


def test_those_with_the_newest_policy_answer_and_the_rest_wait(
    line: Line, workers: list[Member], ray_cluster: str
) -> None:
    async def story() -> tuple[set[tuple[int, ...]], list[list[Delta]]]:
        crew, seen = crew_of(line, ray_cluster), set()
        await crew.join()
        asked = asyncio.gather(*(heard(crew, Drawing(0.0, 120)) for _ in range(3)))
        while not asked.done():
            seen.add(tuple([await member.actor.answering.remote() for member in workers]))
            await asyncio.sleep(0.02)
        return seen, await asked

    line.show(tuple(workers))
    seen, answers = asyncio.run(story())
    assert (1, 1, 0) in seen, "one has a slot at each, the third waits for one"
    assert {busy[2] for busy in seen} == {0} and max(max(busy) for busy in seen) == 1
    for deltas in answers:
        assert [delta.token_ids[0] for delta in deltas] == list(range(11, 131))
        assert {delta.versions for delta in deltas} == {(5,)} and deltas[-1].finish_reason == "length"


def test_another_worker_goes_on_where_one_was_killed(line: Line, workers: list[Member], ray_cluster: str) -> None:
    async def story() -> list[Delta]:
        crew = crew_of(line, ray_cluster)
        await crew.join()
        told = []
        async for delta in crew.stream([10], Drawing(0.0, 60), "asked"):
            told.append(delta)
            if len(told) == 5:
                (victim,) = [m for m in workers if await m.actor.answering.remote()]
                ray.kill(victim.actor)
        return told

    line.show(tuple(workers))
    assert [delta.token_ids[0] for delta in asyncio.run(story())] == list(range(11, 71)), (
        "no token twice, none left out"
    )


def test_whoever_leaves_frees_the_slot_and_the_worker(line: Line, workers: list[Member], ray_cluster: str) -> None:
    async def story() -> int:
        crew = crew_of(line, ray_cluster)
        await crew.join()
        deltas: Any = crew.stream([10], Drawing(0.0, 190), "leaves")
        async with aclosing(deltas):
            await anext(deltas)
        assert len(await heard(crew)) == 8
        async with asyncio.timeout(1):
            while await workers[0].actor.answering.remote():
                await asyncio.sleep(0.02)
        return int(await workers[0].actor.answering.remote())

    line.show((workers[0],))
    assert asyncio.run(story()) == 0


def test_where_nobody_plays_it_says_so_and_goes_on_with_the_next_who_does(
    line: Line, workers: list[Member], ray_cluster: str
) -> None:
    async def story() -> None:
        crew, renewed = crew_of(line, ray_cluster), asyncio.Event()
        await crew.join()
        following = asyncio.ensure_future(crew.follow(renewed.set))
        line.show(())
        await asyncio.sleep(0.3)
        with pytest.raises(EngineDied, match="no rollout worker"):
            await heard(crew)
        assert crew.version == 4 and not renewed.is_set()
        line.show(tuple(workers))
        assert len(await heard(crew)) == 8
        assert crew.version == 5 and renewed.is_set()
        following.cancel()

    line.show((workers[2],))
    asyncio.run(story())
