"""The weight store: bytes written once and mapped, a copy on another node, bad policies refused before the engine."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import RayActorError

from rollcast.chat import ChatCodec
from rollcast.episode import EpisodeLimits
from rollcast.sampler import ScriptedSampler
from rollcast.weights import NodeAgent, Store, StoreHandle, WeightsMissing, WeightsRefused, sweep_abandoned
from rollcast.worker import RolloutWorker
from rollcast_learners.arena import Arena, policy_specs
from rollcast_learners.errors import LearnerLost
from rollcast_learners.segments import validate
from rollcast_learners.types import Prompt, Sampling, Weights

TENSORS = {
    "embed.weight": torch.randn(64, 32, dtype=torch.bfloat16),
    "norm.weight": torch.ones(32, dtype=torch.bfloat16),
}


@pytest.fixture
def store(ray_cluster: str) -> Iterator[Store]:
    made = Store("test-weights", ray.get_runtime_context().get_node_id(), 0)
    yield made
    made.close()
    assert not Path(made.folder).exists()


def published(arena: Arena, version: int, home: str, retire: list[int] | None = None) -> Weights:
    for old in retire or []:
        arena.retire(old)
    segments, manifest = arena.write(version, TENSORS)
    return Weights("full", version, manifest, segments, home, str(arena.folder))


@pytest.mark.ray
def test_versions_are_given_back_in_order_when_nobody_reads_them(store: Store) -> None:
    arena = Arena(store.folder, policy_specs(TENSORS))
    handle = store.handle(policy_specs(TENSORS))
    weights = [published(arena, version, store.home) for version in range(3)]
    assert asyncio.run(handle.pull(weights[1], "worker-0")) == store.folder
    assert store.free(2) == [0], "version 1 is being read"
    assert asyncio.run(handle.pull(weights[1], "worker-1")) == store.folder
    asyncio.run(handle.release(1, "worker-0"))
    assert store.free(2) == []
    store.forget("worker-1")  # It died while it read.
    assert store.free(2) == [1]
    with pytest.raises(WeightsRefused, match="superseded"):
        asyncio.run(handle.pull(weights[1], "worker-2"))
    arena.close()


@pytest.mark.ray
def test_another_node_gets_one_copy_and_loses_it_when_superseded(store: Store) -> None:
    arena = Arena(store.folder, policy_specs(TENSORS))
    home = store.agents[store.home]
    elsewhere = ray.remote(NodeAgent).remote("test-weights", "another-node", 0)
    weights = published(arena, 0, store.home)
    folders = ray.get([elsewhere.acquire.remote(weights, f"worker-{n}", home) for n in range(2)])
    folder = Path(folders[0])
    assert folders[0] == folders[1] != store.folder
    validate(weights, folder, policy_specs(TENSORS))
    assert (folder / weights.segments[0]).read_bytes() == (Path(store.folder) / weights.segments[0]).read_bytes()
    ray.get([elsewhere.release.remote(0, f"worker-{n}") for n in range(2)])
    assert ray.get(elsewhere.free.remote(1)) == [0]
    assert not (folder / weights.segments[0]).exists()
    ray.get(elsewhere.close.remote())
    arena.close()


@pytest.mark.ray
def test_what_a_dead_learner_published_goes_once_nobody_reads_it(store: Store) -> None:
    lost, folder = Arena(store.folder, policy_specs(TENSORS)), Path(store.folder)
    handle = store.handle(policy_specs(TENSORS))
    weights = [published(lost, version, store.home) for version in range(2)]
    lost.retire(0)  # Its pages are spare, without a version.
    asyncio.run(handle.pull(weights[1], "worker-0"))
    store.begin_again(store.home, 3)
    assert {path.name for path in folder.glob("*.safetensors")} == set(weights[1].segments), "that one is being read"
    assert not list(folder.glob(".*.writing"))
    with pytest.raises(WeightsRefused, match="superseded"):
        asyncio.run(handle.pull(weights[1], "worker-1"))
    asyncio.run(handle.release(1, "worker-0"))
    assert not list(folder.glob("*.safetensors"))
    arena = Arena(store.folder, policy_specs(TENSORS))
    again = [published(arena, version, store.home) for version in (3, 4)]
    assert asyncio.run(handle.pull(again[1], "worker-0")) == store.folder
    assert store.free(4) == [3], "versions are given back from the first of the new learner on"
    arena.close()


@pytest.mark.ray
def test_what_was_given_back_to_a_learner_that_then_died_goes_too(store: Store) -> None:
    lost, folder = Arena(store.folder, policy_specs(TENSORS)), Path(store.folder)
    for version in range(2):
        published(lost, version, store.home)
    assert store.free(1) == [0], "its pages may carry a later version, and never will"
    store.begin_again(store.home, 3)
    assert not list(folder.glob("*.safetensors"))


def flip_a_bit(weights: Weights, folder: Path) -> Weights:
    entry = weights.manifest[0]
    with (folder / weights.segments[0]).open("r+b") as file:
        file.seek(entry.offset)
        byte = file.read(1)[0]
        file.seek(entry.offset)
        file.write(bytes([byte ^ 1]))
    return weights


def drop_a_tensor(weights: Weights, folder: Path) -> Weights:
    return replace(weights, manifest=weights.manifest[1:])


def change_a_shape(weights: Weights, folder: Path) -> Weights:
    return replace(weights, manifest=(replace(weights.manifest[0], shape=(32, 64)), *weights.manifest[1:]))


def plant_a_nan(weights: Weights, folder: Path) -> Weights:
    poisoned = {name: tensor.clone() for name, tensor in TENSORS.items()}
    poisoned["norm.weight"][3] = float("nan")
    arena = Arena(folder / "poisoned", policy_specs(TENSORS))
    segments, manifest = arena.write(weights.version, poisoned, scan=False)
    (folder / "poisoned" / segments[0]).replace(folder / segments[0])
    return replace(weights, manifest=manifest)


@pytest.mark.ray
@pytest.mark.parametrize("spoil", [flip_a_bit, drop_a_tensor, change_a_shape, plant_a_nan])
def test_a_bad_policy_is_refused_before_the_pause_and_the_old_one_plays_on(
    store: Store, tiny_bf16: str, spoil: Callable[[Weights, Path], Weights]
) -> None:
    arena = Arena(store.folder, policy_specs(TENSORS))
    handle = store.handle(policy_specs(TENSORS))
    good = published(arena, 0, store.home)
    bad = spoil(published(arena, 1, store.home), Path(store.folder))

    async def story() -> None:
        codec = ChatCodec.from_folder(tiny_bf16)
        sampler = ScriptedSampler(codec.tokenizer.eos_token_id)
        worker = RolloutWorker(sampler, codec, EpisodeLimits(1, 1), 5.0, 0.1)

        async def pull(weights: Weights) -> str:
            return await handle.pull(weights, "worker-0")

        assert (await worker.load(good, pull)).version == 0
        outcome = await worker.load(bad, pull)
        assert outcome.refused is not None and outcome.version == 0 and sampler.version == 0
        assert any(entry.name in outcome.refused for entry in good.manifest), "it names the tensor"
        prompt = Prompt("0.1.0", "0", "rollcast/QA-v0", 3)
        [trajectory] = await worker.play([prompt], Sampling(1.0, 8), version=1)
        assert trajectory.error is None and trajectory.versions == (0,)
        await worker.close()

    asyncio.run(story())
    arena.close()


def test_folders_of_dead_owners_are_swept_and_those_of_the_living_stay(tmp_path: Path) -> None:
    async def make() -> NodeAgent:
        return NodeAgent("living", "a-node", 0, str(tmp_path))

    living = asyncio.run(make())
    dead = tmp_path / "rollcast-dead-a-node-999999999"
    dead.mkdir()
    (dead / "owner.json").write_text('{"pid": 999999999, "started": 1.0}')
    (dead / "v0-0.safetensors").write_bytes(b"weights")
    assert sweep_abandoned(tmp_path) == [dead]
    assert living.folder.exists() and not dead.exists()


# ---- nodes that go


@pytest.mark.ray
def test_a_policy_whose_home_is_gone_or_silent_is_missing_and_may_come_later(store: Store) -> None:
    """Told by an agent on another node, to a worker that plays on with what it has."""
    arena = Arena(store.folder, policy_specs(TENSORS))
    weights = published(arena, 0, store.home)
    elsewhere = ray.remote(NodeAgent).remote("test-weights", "another-node", 0, transfer_s=0.5)

    class Silent:
        async def read(self, name: str) -> None:
            await asyncio.sleep(60)

    silent = ray.remote(Silent).remote()
    missing = ray.get(elsewhere.acquire.remote(weights, "worker-0", silent))
    assert missing.passing and "did not send it within 0.5 s" in missing.why and store.home[:8] in missing.why
    ray.kill(silent)
    missing = ray.get(elsewhere.acquire.remote(weights, "worker-0", silent))
    assert missing.passing and "is gone" in missing.why
    folder = ray.get(elsewhere.acquire.remote(weights, "worker-0", store.agents[store.home]))
    validate(weights, Path(folder), policy_specs(TENSORS))
    ray.get(elsewhere.close.remote())
    ray.kill(elsewhere)
    arena.close()


@pytest.mark.ray
def test_without_an_agent_a_policy_is_missing(store: Store) -> None:
    arena = Arena(store.folder, policy_specs(TENSORS))
    weights = published(arena, 0, store.home)
    handle = store.handle(policy_specs(TENSORS))
    far = replace(weights, home="a-lost-node")
    with pytest.raises(WeightsMissing, match="node a-lost-n has no agent"):
        asyncio.run(handle.pull(far, "worker-0"))
    with pytest.raises(WeightsMissing, match="this node has no agent"):
        asyncio.run(StoreHandle({}, handle.specs).pull(weights, "worker-0"))
    arena.close()


@pytest.mark.ray
def test_the_death_of_the_agent_at_home_is_the_learners(ray_cluster: str) -> None:
    store = Store("test-home", ray.get_runtime_context().get_node_id(), 0)
    folder = Path(store.folder)
    handle = store.handle(policy_specs(TENSORS))
    arena = Arena(store.folder, policy_specs(TENSORS))
    weights = published(arena, 0, store.home)
    agent = store.agents[store.home]
    ray.kill(agent)
    with pytest.raises(RayActorError):  # It dies a moment later.
        while True:
            ray.get(agent.folder_path.remote(), timeout=30)
    with pytest.raises(LearnerLost, match=store.home[:8]):
        store.free(0)
    with pytest.raises(WeightsMissing, match="agent of the store is gone"):
        asyncio.run(handle.pull(weights, "worker-0"))
    store.begin_again(store.home, 1)
    assert store.folder != str(folder) and not folder.exists(), "the new agent has swept up"
    again = Arena(store.folder, policy_specs(TENSORS))
    weights = published(again, 1, store.home)
    assert asyncio.run(store.handle(policy_specs(TENSORS)).pull(weights, "worker-0")) == store.folder
    again.close()
    store.close()
