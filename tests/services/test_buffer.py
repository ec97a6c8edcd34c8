"""The trajectory buffer, the share of errors, and the prompt stream: small parts with exact rules."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollcast.buffer import ErrorShare, PlayedGroup, TrajectoryBuffer
from rollcast.config import EnvSection
from rollcast.prompts import PromptStream
from rollcast_learners.types import Prompt, Stream, Trajectory, Turn, VersionSpan


def trajectory(*versions: int, error: str | None = None, reward: float = 1.0) -> Trajectory:
    """An episode with one sampled token from each of `versions`, after one prompt token."""
    count = len(versions)
    stream = Stream(
        np.arange(count + 1, dtype=np.int32),
        np.array([False] + [True] * count),
        np.zeros(count + 1, np.float32),
        tuple(VersionSpan(version, i + 1, i + 2) for i, version in enumerate(versions)),
    )
    turns = (Turn(0, 1, count + 1, "q", "a", reward, "stop"),)
    return Trajectory(Prompt("0", "0", "x", 0), (stream,), turns, True, False, error=error)


def group(number: int, *versions: int, samples: int = 2) -> PlayedGroup:
    return PlayedGroup(number, tuple(trajectory(*versions) for _ in range(samples)))


def numbers(groups: list[PlayedGroup]) -> list[int]:
    return [played.number for played in groups]


def test_staleness_counts_from_the_oldest_token() -> None:
    played = PlayedGroup(0, (trajectory(5), trajectory(3, 4)))
    assert played.oldest_version == 3 and played.staleness(5) == 2


def test_groups_leave_in_order_a_step_at_a_time() -> None:
    buffer = TrajectoryBuffer(groups_per_step=2, max_staleness=1)
    buffer.add([group(7, 0)])
    assert not buffer.ready() and len(buffer) == 1
    buffer.add([group(3, 0), group(5, 0)])
    assert buffer.ready() and numbers(buffer.take()) == [7, 3]
    assert not buffer.ready() and len(buffer) == 1


@pytest.mark.parametrize(("max_staleness", "kept"), [(0, [2]), (1, [1, 2]), (2, [0, 1, 2])])
def test_what_is_too_old_is_dropped_counted_and_handed_back(max_staleness: int, kept: list[int]) -> None:
    buffer = TrajectoryBuffer(len(kept), max_staleness)
    buffer.add([group(version, version, samples=3) for version in range(3)])
    dropped = buffer.expire(version=2)
    assert numbers(dropped) == [number for number in range(3) if number not in kept]
    assert buffer.dropped_stale == 3 * len(dropped)
    assert buffer.expire(version=2) == [] and numbers(buffer.take()) == kept


@given(
    ages=st.lists(st.integers(0, 9), max_size=20),
    max_staleness=st.integers(0, 4),
    version=st.integers(9, 12),
)
def test_nothing_too_old_is_taken_and_nothing_is_lost(ages: list[int], max_staleness: int, version: int) -> None:
    buffer = TrajectoryBuffer(1, max_staleness)
    buffer.add([group(number, oldest, 9) for number, oldest in enumerate(ages)])
    dropped = numbers(buffer.expire(version))
    taken = [buffer.take()[0] for _ in range(len(buffer))]
    assert all(played.staleness(version) <= max_staleness for played in taken)
    assert sorted(dropped + numbers(taken)) == list(range(len(ages)))
    # The oldest policy's groups go first; of one policy, in order of arrival.
    assert numbers(taken) == sorted(numbers(taken), key=lambda number: (ages[number], number))


def test_errors_of_a_group_say_why() -> None:
    silent = dataclasses.replace(trajectory(0), streams=())
    poisoned = trajectory(0, reward=float("nan"))
    played = PlayedGroup(0, (trajectory(0), trajectory(error="it broke"), silent, poisoned))
    reason = "nothing was sampled, or not a finite number"
    assert played.errors == ["it broke", reason, reason]


def test_the_share_of_errors_is_of_the_last_episodes() -> None:
    share = ErrorShare(window=10)
    assert (share.share, share.seen, share.first_cause) == (0.0, 0, None)
    broken = PlayedGroup(0, (trajectory(error="first"), trajectory(error="second"), trajectory(0)))
    share.add(broken)
    assert share.share == pytest.approx(2 / 3) and share.seen == 3
    for _ in range(4):
        share.add(group(1, 0))
    assert share.share == pytest.approx(1 / 10) or share.share == pytest.approx(2 / 10)
    share.add(group(1, 0, samples=10))
    assert share.share == 0.0 and share.seen == 10
    share.add(PlayedGroup(2, (trajectory(error="third"),)))
    assert share.first_cause == "first" and share.total == 3 and share.share == pytest.approx(0.1)


ENVS = (
    EnvSection(id="rollcast/QA-v0", weight=3.0, kwargs={"split": "train"}),
    EnvSection(id="faulty/Turns-v0", weight=1.0),
)


def test_the_same_number_gives_the_same_prompts() -> None:
    first, second = PromptStream(ENVS, 4, seed=1), PromptStream(ENVS, 4, seed=1)
    ahead = [second.group(number) for number in reversed(range(50))]
    assert [first.group(number) for number in range(50)] == ahead[::-1]
    assert first.group(7) != PromptStream(ENVS, 4, seed=2).group(7)


def test_the_samples_of_a_group_differ_in_their_id_only() -> None:
    stream = PromptStream(ENVS, 4, seed=1)
    prompts = [*stream.group(7), *stream.group(7, attempt=2)]
    assert len({prompt.id for prompt in prompts}) == 8
    assert len({dataclasses.replace(p, id="", kwargs=()) == prompts[0] for p in prompts}) == 1
    assert {(p.group_id, p.env_id, p.seed, str(p.kwargs)) for p in prompts} == {
        ("7", prompts[0].env_id, prompts[0].seed, str(prompts[0].kwargs))
    }


def test_environments_are_mixed_by_weight_and_seeds_differ() -> None:
    prompts = [PromptStream(ENVS, 1, seed=0).group(number)[0] for number in range(2000)]
    share = sum(prompt.env_id == "rollcast/QA-v0" for prompt in prompts) / len(prompts)
    assert share == pytest.approx(0.75, abs=0.04)
    assert len({prompt.seed for prompt in prompts}) > 1990
    assert all(dict(p.kwargs) == {"split": "train"} for p in prompts if p.env_id == "rollcast/QA-v0")
