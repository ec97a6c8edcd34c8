"""Trajectories made by hand or at random, and a packed batch taken apart again.

Owns: small inputs for the learner's tests, and the oracle that says what a batch means. Does not know torch.
"""

from dataclasses import dataclass

import numpy as np

from rollcast_learners.batch import NO_ROW, Batch, OnLength
from rollcast_learners.types import FinishReason, Prompt, Stream, Trajectory, Turn, VersionSpan

VOCABULARY = 256

Segment = tuple[list[int], bool]
"""Token ids, and whether the policy sampled them."""


def stream(*segments: Segment, logprobs: list[float] | None = None) -> Stream:
    """One stream of asked and sampled segments; `logprobs` are of the sampled tokens, -5.5 by default."""
    tokens = np.array([token for ids, _ in segments for token in ids], np.int32)
    trained = np.array([sampled for ids, sampled in segments for _ in ids], np.bool_)
    logprobs_T = np.zeros(len(tokens), np.float32)
    logprobs_T[trained] = -5.5 if logprobs is None else logprobs
    ends = np.cumsum([len(ids) for ids, _ in segments]).tolist()
    spans = [
        VersionSpan(0, end - len(ids), end)
        for (ids, sampled), end in zip(segments, ends, strict=True)
        if sampled and ids
    ]
    return Stream(tokens, trained, logprobs_T, tuple(spans))


def episode(
    segments_of_streams: list[list[Segment]],
    rewards: list[float],
    *,
    group: str = "0",
    number: int = 0,
    truncated: bool = False,
    finish: FinishReason = "stop",
    logprobs: list[list[float]] | None = None,
    error: str | None = None,
) -> Trajectory:
    """An episode with one turn for each sampled segment, and the reward of each turn."""
    streams, turns, left = [], [], list(rewards)
    for index, segments in enumerate(segments_of_streams):
        streams.append(stream(*segments, logprobs=logprobs[index] if logprobs else None))
        end = 0
        for ids, sampled in segments:
            end += len(ids)
            if sampled:
                turns.append(Turn(index, end - len(ids), end, "", "", left.pop(0), "stop"))
    assert not left, "a reward for each sampled segment"
    if turns:
        last = turns[-1]
        turns[-1] = Turn(last.stream, last.start, last.end, "", "", last.reward, finish)
    prompt = Prompt(f"{group}.{number}", group, "rollcast/Test-v0", 0)
    return Trajectory(prompt, tuple(streams), tuple(turns), not truncated, truncated, error=error)


def answer(
    prompt: list[int], ids: list[int], reward: float = 0.0, *, logprobs: list[float] | None = None, **others: object
) -> Trajectory:
    """The plain case: one question, one answer."""
    columns = None if logprobs is None else [logprobs]
    return episode([[(prompt, False), (ids, True)]], [reward], logprobs=columns, **others)  # type: ignore[arg-type]


def random_episodes(seed: int, groups: int = 3, samples: int = 3, longest: int = 6) -> list[Trajectory]:
    """Every form there is: one and several turns and streams, one-token answers, cut off by either side."""
    rng = np.random.default_rng(seed)

    def ids(low: int = 1, high: int = longest) -> list[int]:
        return rng.integers(0, VOCABULARY, rng.integers(low, high + 1)).tolist()

    episodes = []
    for group in range(groups):
        prompt, second = ids(), ids()
        for number in range(samples):
            first: list[Segment] = [(prompt, False), (ids(), True)]
            form = rng.integers(5)
            if form == 1:  # The environment answers, and the policy once more.
                first += [(ids(), False), (ids(), True)]
            if form == 2:  # Something untrained after the last answer.
                first += [(ids(), False)]
            streams = [first]
            if form == 3:  # A rewritten history, which the samples of a group may share.
                streams.append([(second, False), (ids(), True)])
            if form == 4:
                streams.append([(ids(), False), (ids(1, 1), True)])
            turns = sum(sampled for segments in streams for _, sampled in segments)
            logprobs = [
                rng.normal(-5.5, 0.3, sum(len(part) for part, sampled in segments if sampled)).tolist()
                for segments in streams
            ]
            episodes.append(
                episode(
                    streams,
                    rng.normal(size=turns).round(3).tolist(),
                    group=str(group),
                    number=number,
                    truncated=bool(rng.random() < 0.2),
                    finish="length" if rng.random() < 0.3 else "stop",
                    logprobs=logprobs,
                )
            )
    return episodes


@dataclass(frozen=True)
class Token:
    """One trained token: everything before it that the policy may see, and its columns."""

    context: tuple[int, ...]
    target: int
    old_logprob: float
    reward: float
    trained: bool


@dataclass(frozen=True)
class Unpacked:
    """One episode of a batch, as plain lists."""

    tokens: tuple[Token, ...]
    bootstrap: tuple[int, ...] | None
    """The tokens before the state whose value goes on, if any."""


def unpack(batch: Batch) -> list[Unpacked]:
    """What a batch means, found by walking its tables row by row; positions are held to the contexts."""
    contexts = _contexts(batch)
    episodes, start = [], 0
    for length, bootstrap in zip(batch.episode_length_E.tolist(), batch.bootstrap_row_E.tolist(), strict=True):
        columns = range(start, start + length)
        episodes.append(
            Unpacked(
                tuple(
                    Token(
                        contexts[batch.row_N[n]],
                        int(batch.target_N[n]),
                        float(batch.old_logprobs_N[n]),
                        float(batch.rewards_N[n]),
                        bool(batch.loss_mask_N[n]),
                    )
                    for n in columns
                ),
                None if bootstrap == NO_ROW else contexts[bootstrap],
            )
        )
        start += length
    assert start == len(batch.target_N)
    return episodes


def _contexts(batch: Batch) -> list[tuple[int, ...]]:
    """For each packed row, the tokens it sees, itself included; every row belongs to exactly one segment."""
    contexts: dict[int, tuple[int, ...]] = {}

    def add(start: int, length: int, before: tuple[int, ...]) -> tuple[int, ...]:
        seen = before
        for row in range(start, start + length):
            seen = (*seen, int(batch.tokens_T[row]))
            assert row not in contexts
            assert batch.positions_T[row] == len(seen) - 1
            contexts[row] = seen
        return seen

    after: list[tuple[int, ...]] = []
    tables = (batch.segment_start_S, batch.segment_length_S, batch.segment_above_S)
    for start, length, above in zip(*(table.tolist() for table in tables), strict=True):
        after.append(add(start, length, () if above == NO_ROW else after[above]))
    assert sorted(contexts) == list(range(batch.tokens))
    return [contexts[row] for row in range(batch.tokens)]


def expected(trajectory: Trajectory, on_length: OnLength = "zero") -> Unpacked:
    """What `collate` must make of a trajectory, said in another way: by plain lists, without rows."""
    cut = trajectory.turns[-1].finish_reason == "length"
    places, tokens = [], []
    for index, part in enumerate(trajectory.streams):
        for at in np.flatnonzero(part.trained_T).tolist():
            places.append((index, at))
    for index, at in places:
        rewards = [
            turn.reward
            for turn in trajectory.turns
            if (index, at) == max([p for p in places if p < (turn.stream, turn.end)], default=places[0])
        ]
        part = trajectory.streams[index]
        tokens.append(
            Token(
                tuple(part.token_ids_T[:at].tolist()),
                int(part.token_ids_T[at]),
                float(part.logprobs_T[at]),
                float(np.float32(sum(rewards))),
                not (on_length == "mask" and cut),
            )
        )
    last = trajectory.streams[places[-1][0]].token_ids_T.tolist()
    continues = trajectory.truncated or (on_length == "bootstrap" and cut)
    return Unpacked(tuple(tokens), tuple(last) if continues else None)
