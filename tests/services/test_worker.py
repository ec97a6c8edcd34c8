"""The rollout worker: the order of a weight update, what may leave it when, and how its time adds up."""

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

import faulty_envs  # noqa: F401  (registers them)
from rollcast.chat import ChatCodec
from rollcast.episode import EpisodeLimits
from rollcast.intake import WeightsRefused
from rollcast.sampler import EngineDied, LoadReport, ScriptedSampler
from rollcast.worker import RolloutWorker
from rollcast_learners.types import Probe, Prompt, Sampling, Trajectory, Weights
from tiny_model import write_tiny_model

EOS = 258
SAMPLING = Sampling(1.0, 64)
PROBE = Probe(np.arange(12, dtype=np.int32).reshape(2, 6), np.full((2, 5), -1.0, np.float32))
WRONG = Probe(PROBE.token_ids_RL, PROBE.logprobs_RL - 0.5)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    return ChatCodec.from_folder(str(write_tiny_model(tmp_path_factory.mktemp("worker"))))


class Recorded(ScriptedSampler):
    """The shipped scripted engine, which also keeps a diary."""

    def __init__(self, diary: list[str], **settings: Any) -> None:
        super().__init__(EOS, self._say, **settings)
        self.diary = diary
        self.began = asyncio.Event()

    def _say(self, token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
        self.began.set()
        return [5] * 20

    async def load(self, weights: Weights, folder: str) -> LoadReport:
        self.diary.append(f"pause for {weights.version} from {folder}")
        report = await super().load(weights, folder)
        self.diary.append(f"resume {self.version}")
        return report

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        self.diary.append(f"probe {self.version}")
        await asyncio.sleep(0.05)
        return await super().logprobs(token_ids)


class Bench:
    """A worker, its diary, and a store that refuses on request."""

    def __init__(self, codec: ChatCodec, **settings: Any) -> None:
        self.diary: list[str] = []
        self.sampler = Recorded(self.diary, **settings)
        self.worker = RolloutWorker(self.sampler, codec, EpisodeLimits(8, 3), 5.0, probe_max_gap=0.08)

    async def pull(self, weights: Weights) -> str:
        self.diary.append(f"validate {weights.version}")
        await asyncio.sleep(0)
        return f"folder-{weights.version}"

    async def refuse(self, weights: Weights) -> str:
        raise WeightsRefused("tensor model.norm.weight holds NaN or infinity")

    async def load(self, version: int, probe: Probe | None = PROBE) -> Any:
        return await self.worker.load(Weights("full", version, (), (), "", "", probe), self.pull)

    async def play(self, group: int = 0, samples: int = 2, version: int = 0) -> list[Trajectory]:
        return await self.worker.play(prompts(group, samples), SAMPLING, version)


def prompts(group: int, samples: int) -> list[Prompt]:
    kwargs = {"rewards": (1.0,)}
    return [Prompt(f"{group}.1.{i}", str(group), "faulty/Turns-v0", 1, kwargs) for i in range(samples)]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def test_weights_are_validated_then_paused_loaded_resumed_and_probed(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec, seconds_to_load=0.02)
        loaded = await bench.load(4)
        assert bench.diary == ["validate 4", "pause for 4 from folder-4", "resume 4", "probe 4", "probe 4"]
        assert loaded.version == bench.worker.version == 4 and loaded.refused is None
        assert loaded.load_s == 0.02 and loaded.gap_mean == loaded.gap_max == 0.0
        await bench.worker.close()

    run(go())


def test_an_old_announcement_is_left_alone(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec)
        await bench.load(4)
        bench.diary.clear()
        assert (await bench.load(3)).version == 4 and (await bench.load(4)).version == 4
        assert bench.diary == []

    run(go())


def test_refused_weights_leave_the_old_policy_playing(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec)
        await bench.load(0)
        bench.diary.clear()
        answer = asyncio.create_task(bench.play())
        refused = await bench.worker.load(Weights("full", 1, (), (), "", "", PROBE), bench.refuse)
        assert refused.version == 0 and "model.norm.weight holds NaN" in refused.refused
        assert bench.diary == [] and bench.worker.version == 0
        assert [t.versions for t in await answer] == [(0,), (0,)]
        assert [t.versions for t in await bench.play(1)] == [(0,), (0,)]
        assert (await bench.load(2)).version == 2, "a better one is taken in afterwards"
        assert [t.versions for t in await bench.play(2)] == [(2,), (2,)]
        await bench.worker.close()

    run(go())


@pytest.mark.parametrize("wrong", [WRONG, Probe(PROBE.token_ids_RL, PROBE.logprobs_RL * np.nan)])
def test_a_probe_gap_kills_the_engine_and_keeps_what_it_sampled(codec: ChatCodec, wrong: Probe) -> None:
    async def go() -> None:
        bench = Bench(codec, seconds_per_token=0.001)
        await bench.load(0)
        before = asyncio.create_task(bench.play(0))
        await bench.sampler.began.wait()
        loading = asyncio.create_task(bench.load(1, wrong))
        while bench.worker.version == 0:
            await asyncio.sleep(0)
        during = asyncio.create_task(bench.play(1))
        with pytest.raises(EngineDied, match=r"version 1 .* (0\.500|nan) nat"):
            await loading
        done, pending = await asyncio.wait([before, during], timeout=0.2)
        assert not done and pending == {before, during}
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
        await bench.worker.close()

    run(go())


def test_a_failure_after_the_pause_loses_the_engine(codec: ChatCodec) -> None:
    class Failing(Recorded):
        async def load(self, weights: Weights, folder: str) -> LoadReport:
            raise KeyError("lm_head.weight")

    async def go() -> None:
        bench = Bench(codec)
        await bench.load(0)
        bench.worker.intake.sampler = Failing(bench.diary)
        with pytest.raises(EngineDied, match=r"version 1 failed with KeyError: 'lm_head.weight'"):
            await bench.load(1)
        bench.worker.intake.sampler = bench.sampler
        short = Probe(PROBE.token_ids_RL, PROBE.logprobs_RL[:, :3])
        with pytest.raises(EngineDied, match="version 2 failed with ValueError"):
            await bench.load(2, short)

    run(go())


def test_answers_of_a_pending_probe_leave_only_after_it(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec)
        await bench.load(0)
        loading = asyncio.create_task(bench.load(1))
        while bench.worker.version == 0:
            await asyncio.sleep(0)
        held = asyncio.create_task(bench.play())
        await asyncio.sleep(0.01)
        assert not held.done() and not loading.done()
        assert (await loading).gap_mean == 0.0
        assert [t.versions for t in await held] == [(1,), (1,)]
        await bench.worker.close()

    run(go())


def test_answers_in_flight_go_on_under_the_new_policy(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec, seconds_per_token=0.01)
        await bench.load(0)
        flying = asyncio.create_task(bench.play())
        await bench.sampler.began.wait()
        await asyncio.sleep(0.03)
        await bench.load(1)
        assert [t.versions for t in await flying] == [(0, 1), (0, 1)]
        await bench.worker.close()

    run(go())


def test_play_waits_for_the_version_it_is_to_use(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec)
        first = asyncio.create_task(bench.play(0))
        await asyncio.sleep(0.01)
        assert not first.done(), "without any policy nothing is played"
        await bench.load(0)
        assert (await first)[0].versions == (0,)
        later = asyncio.create_task(bench.play(1, version=2))
        await bench.load(1)
        await asyncio.sleep(0.01)
        assert not later.done()
        await bench.load(2)
        assert (await later)[0].versions == (2,)
        await bench.worker.close()

    run(go())


def test_groups_are_played_side_by_side(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec, seconds_per_token=0.01)
        await bench.load(0)
        started = time.monotonic()
        groups = await asyncio.gather(*[bench.play(group, samples=4) for group in range(4)])
        took = time.monotonic() - started
        assert [[t.prompt.group_id for t in group] for group in groups] == [[str(g)] * 4 for g in range(4)]
        assert took < 16 * 21 * 0.01 / 2, "sixteen answers of 0.2 s each, one after the other, take 3.4 s"
        await bench.worker.close()

    run(go())


def test_time_and_tokens_add_up(codec: ChatCodec) -> None:
    async def go() -> None:
        started = time.monotonic()
        bench = Bench(codec, seconds_per_token=0.005)
        await bench.load(0)
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(bench.play(0, version=1))
        await asyncio.sleep(0.05)
        idle = bench.worker.occupation()
        assert idle.busy_s == 0 and idle.tokens == 0, "waiting for a policy is not work"
        await bench.load(1)
        await asyncio.gather(waiting, bench.play(1))
        busy = bench.worker.occupation()
        total = time.monotonic() - started
        assert busy.busy_s >= 0.1 and busy.tokens == 4 * 21
        assert idle.busy_s + idle.idle_s + busy.busy_s + busy.idle_s == pytest.approx(total, abs=0.05)
        assert bench.worker.occupation().tokens == 0
        await bench.worker.close()

    run(go())


def test_a_bad_episode_does_not_spoil_its_group(codec: ChatCodec) -> None:
    async def go() -> None:
        bench = Bench(codec)
        await bench.load(0)
        bad = Prompt("0.1.9", "0", "faulty/Broken-v0", 1, {"at": "step", "how": "None"})
        good, failed = await bench.worker.play([*prompts(0, 1), bad], SAMPLING)
        assert good.error is None and failed.error is not None and failed.prompt is bad
        assert await bench.worker.alive()
        await bench.worker.close()

    run(go())
