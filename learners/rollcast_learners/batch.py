"""Trajectories become one packed batch: `collate`, and `Batch.select` to cut it into smaller ones.

Owns: the packed layout. Does not know torch, losses or advantages.

Layout. What a model computes for a token depends on the tokens before it alone, so whatever several samples begin with
is held once: the system prompt of all questions, the question of its answers, and the words that answers begin with in
common. A batch is the prefix tree of its samples, *segment* by segment, each followed by those that continue it. A row
attends to the segments above its own and to its own up to itself, which gives the same numbers as one full sequence a
sample, for a fraction of the rows (one level of it: Prefix Grouper, arXiv 2506.05433). No padding anywhere.

Legend: E episodes, L streams that are trained on, S segments, T packed rows, N trained tokens (sampled by the policy,
in episode order).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rollcast_learners.prefix_tree import NO_SEGMENT, PrefixTree
from rollcast_learners.types import Stream, Trajectory

OnLength = Literal["zero", "bootstrap", "mask"]
NO_ROW = -1


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed, ragged, opaque to every library. Collate -> learner."""

    tokens_T: NDArray[np.int32]
    positions_T: NDArray[np.int32]
    segment_length_S: NDArray[np.int32]
    """Rows of each segment; segments lie one after the other, each at once followed by all below it."""
    segment_above_S: NDArray[np.int32]
    """The segment that it continues, or `NO_ROW`."""
    stream_segment_L: NDArray[np.int32]
    """The last segment of each stream. Its last row predicts the last token, which needs no row of its own."""
    stream_episode_L: NDArray[np.int32]
    target_N: NDArray[np.int32]
    row_N: NDArray[np.int32]
    """The packed row whose hidden state predicts `target_N`."""
    old_logprobs_N: NDArray[np.float32]
    rewards_N: NDArray[np.float32]
    loss_mask_N: NDArray[np.bool_]
    episode_length_E: NDArray[np.int32]
    """Trained tokens an episode; they lie one episode after the other in the N columns."""
    bootstrap_row_E: NDArray[np.int32]
    """The row whose value continues a truncated episode, else `NO_ROW`."""
    group_E: NDArray[np.int32]
    index_E: NDArray[np.int32]
    """Position in the batch as it was collated: by it all learners agree on the minibatches."""
    episodes_total: int
    """Episodes in the batch as it was collated, over all learners."""

    @property
    def episodes(self) -> int:
        return len(self.episode_length_E)

    @property
    def tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def trained_tokens(self) -> int:
        return int(self.loss_mask_N.sum())

    @property
    def trained_episodes(self) -> int:
        """Episodes of which at least one token is trained on."""
        return len(np.unique(self.episode_of_N[self.loss_mask_N]))

    @property
    def episode_of_N(self) -> NDArray[np.intp]:
        """The episode of each trained token."""
        return np.repeat(np.arange(self.episodes), self.episode_length_E)

    def trained_of(self, episodes: NDArray[np.intp]) -> NDArray[np.intp]:
        """Indices into the N columns that belong to `episodes`, in that order."""
        stops = np.cumsum(self.episode_length_E)
        return _concatenate_ranges(stops[episodes] - self.episode_length_E[episodes], self.episode_length_E[episodes])

    @property
    def segment_start_S(self) -> NDArray[np.int32]:
        """The first row of each segment."""
        starts: NDArray[np.int32] = (np.cumsum(self.segment_length_S) - self.segment_length_S).astype(np.int32)
        return starts

    @cached_property
    def seen_until_T(self) -> NDArray[np.int32]:
        """Says of every two rows whether one sees the other: row i sees row j where j <= i < seen_until_T[j].

        It is where the segments below the row's own end.
        """
        stops = (self.segment_start_S + self.segment_length_S).tolist()
        above = self.segment_above_S.tolist()
        for segment in range(len(stops) - 1, -1, -1):
            if above[segment] != NO_ROW:
                stops[above[segment]] = max(stops[above[segment]], stops[segment])
        return np.repeat(np.array(stops, np.int32), self.segment_length_S)

    def select(self, episodes: NDArray[np.intp]) -> "Batch":
        """The batch of these episodes alone (ascending indices), packed afresh."""
        streams = np.flatnonzero(np.isin(self.stream_episode_L, episodes))
        segments = self._with_those_above(self.stream_segment_L[streams])
        rows = _concatenate_ranges(self.segment_start_S[segments], self.segment_length_S[segments])
        new_row_T = _new_numbers(rows, self.tokens)
        new_segment_S = _new_numbers(segments, len(self.segment_length_S))
        trained = self.trained_of(episodes)
        return Batch(
            tokens_T=self.tokens_T[rows],
            positions_T=self.positions_T[rows],
            segment_length_S=self.segment_length_S[segments],
            segment_above_S=new_segment_S[self.segment_above_S[segments]],
            stream_segment_L=new_segment_S[self.stream_segment_L[streams]],
            stream_episode_L=np.searchsorted(episodes, self.stream_episode_L[streams]).astype(np.int32),
            target_N=self.target_N[trained],
            row_N=new_row_T[self.row_N[trained]],
            old_logprobs_N=self.old_logprobs_N[trained],
            rewards_N=self.rewards_N[trained],
            loss_mask_N=self.loss_mask_N[trained],
            episode_length_E=self.episode_length_E[episodes],
            bootstrap_row_E=new_row_T[self.bootstrap_row_E[episodes]],
            group_E=self.group_E[episodes],
            index_E=self.index_E[episodes],
            episodes_total=self.episodes_total,
        )

    def with_a_row(self) -> "Batch":
        """Of a batch without rows, one that can pass through a model: a single row, of which nothing is asked."""
        zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
        above = np.full(1, NO_ROW, np.int32)
        return replace(self, tokens_T=zero, positions_T=zero, segment_length_S=one, segment_above_S=above)

    def _with_those_above(self, segments: NDArray[np.int32]) -> NDArray[np.intp]:
        """These segments and all that they continue, in packed order."""
        kept_S = np.zeros(len(self.segment_length_S), np.bool_)
        while len(segments):
            kept_S[segments] = True
            segments = np.unique(self.segment_above_S[segments])
            segments = segments[segments != NO_ROW]
        return np.flatnonzero(kept_S)

    def shares(self, count: int) -> list["Batch"]:
        """One share a learner, balanced by packed rows; groups stay whole, to be normalised locally.

        A share is empty only if there are fewer groups than learners.
        """
        groups, group_of_E = np.unique(self.group_E, return_inverse=True)
        rows_G = np.zeros(len(groups), np.int64)
        paths = zip(group_of_E[self.stream_episode_L].tolist(), self._paths(), strict=True)
        for group, segment in {(group, segment) for group, path in paths for segment in path}:
            rows_G[group] += self.segment_length_S[segment]
        loads, owner_G = np.zeros(count), np.zeros(len(groups), np.int64)
        for group in np.argsort(-rows_G, kind="stable"):
            owner_G[group] = np.argmin(loads)
            loads[owner_G[group]] += rows_G[group]
        return [self.select(np.flatnonzero(owner_G[group_of_E] == rank)) for rank in range(count)]

    def microbatches(self, token_budget: int) -> list[NDArray[np.intp]]:
        """Episode indices of parts of at most `token_budget` packed rows (one episode alone may exceed it).

        Walks the episodes in packed order, so that those that begin alike stay together.
        """
        lengths = self.segment_length_S.tolist()
        parts: list[list[int]] = []
        held, rows = set[int](), 0
        for episode, segments in self._segments_of_episodes().items():
            new = sum(lengths[segment] for segment in segments - held)
            if not parts or rows + new > token_budget:
                parts.append([])
                held, rows, new = set(), 0, sum(lengths[segment] for segment in segments)
            parts[-1].append(episode)
            held |= segments
            rows += new
        return [np.sort(np.array(part, np.intp)) for part in parts]

    def _segments_of_episodes(self) -> dict[int, set[int]]:
        """In packed order."""
        found: dict[int, set[int]] = {}
        paths, episodes = self._paths(), self.stream_episode_L.tolist()
        for stream in np.argsort(self.stream_segment_L, kind="stable").tolist():
            found.setdefault(episodes[stream], set()).update(paths[stream])
        return found

    def _paths(self) -> list[list[int]]:
        """Of each stream, all its segments."""
        return [[*self.above(segment), segment] for segment in self.stream_segment_L.tolist()]

    def above(self, segment: int) -> list[int]:
        """The segments that it continues, the first of all first."""
        found: list[int] = []
        upper = int(self.segment_above_S[segment])
        while upper != NO_ROW:
            found.append(upper)
            upper = int(self.segment_above_S[upper])
        return found[::-1]


@dataclass(frozen=True, eq=False)
class _Sampled:
    """One stream that is trained on."""

    episode: int
    number: int
    """Of the stream among those of its episode."""
    stream: Stream
    continues: bool
    """Whether the value after its last token is wanted."""

    @property
    def rows_T(self) -> NDArray[np.int32]:
        """The tokens that need a row: all before the last trained one, which is a target only."""
        rows = len(self.stream.token_ids_T) if self.continues else int(np.flatnonzero(self.stream.trained_T)[-1])
        return self.stream.token_ids_T[:rows]


def usable(trajectory: Trajectory) -> bool:
    """Whether a trajectory may be trained on: no error, something sampled, every number finite."""
    return (
        trajectory.error is None
        and trajectory.sampled_tokens > 0
        and bool(np.isfinite([turn.reward for turn in trajectory.turns]).all())
        and all(bool(np.isfinite(stream.logprobs_T).all()) for stream in trajectory.streams)
        and not any(stream.trained_T[:1].any() for stream in trajectory.streams)  # Nothing predicts a first token.
    )


def collate(trajectories: Sequence[Trajectory], on_length: OnLength = "zero") -> Batch:
    """Packs trajectories; every one must be `usable`.

    Raises `ValueError` for none, or for one that is not usable.
    """
    if not trajectories:
        raise ValueError("cannot collate 0 trajectories; wait for the buffer to be ready")
    bad = [trajectory.prompt.id for trajectory in trajectories if not usable(trajectory)]
    if bad:
        raise ValueError(f"trajectories {bad[:3]} are not usable (error, no tokens or non-finite); filter them first")
    groups = {name: number for number, name in enumerate(dict.fromkeys(t.prompt.group_id for t in trajectories))}
    sampled: list[_Sampled] = []
    for episode, trajectory in enumerate(trajectories):
        numbers = [number for number, stream in enumerate(trajectory.streams) if stream.trained_T.any()]
        for number in numbers:
            continues = number == numbers[-1] and _continues(trajectory, on_length)
            sampled.append(_Sampled(episode, number, trajectory.streams[number], continues))
    return _pack(trajectories, sampled, groups, on_length)


def _continues(trajectory: Trajectory, on_length: OnLength) -> bool:
    """Whether the value of the state after the last token stands for the rewards that were cut off."""
    return trajectory.truncated or (on_length == "bootstrap" and _hit_length(trajectory))


def _hit_length(trajectory: Trajectory) -> bool:
    return trajectory.turns[-1].finish_reason == "length"


def _pack(
    trajectories: Sequence[Trajectory],
    sampled: Sequence[_Sampled],
    groups: dict[str, int],
    on_length: OnLength,
) -> Batch:
    tree = PrefixTree()
    for number, one in enumerate(sampled):
        tree.add(number, one.rows_T)
    packed = list(tree.packed())
    above = [number for number, _ in packed]
    rows_of: list[dict[int, NDArray[np.int32]]] = [{} for _ in trajectories]
    bootstrap_row_E = np.full(len(trajectories), NO_ROW, np.int32)
    stream_segment_L = np.empty(len(sampled), np.int32)
    paths: list[NDArray[np.int32]] = []
    """Of each segment, the rows from the beginning of its streams to its own last row."""
    first_row = 0
    for number, (upper, segment) in enumerate(packed):
        own = np.arange(first_row, first_row + len(segment.tokens_T), dtype=np.int32)
        paths.append(own if upper == NO_SEGMENT else np.concatenate([paths[upper], own]))
        first_row += len(own)
        for end in segment.ends:
            one = sampled[end]
            stream_segment_L[end] = number
            rows_of[one.episode][one.number] = paths[number]
            if one.continues:
                bootstrap_row_E[one.episode] = paths[number][-1]
    lengths = [len(segment.tokens_T) for _, segment in packed]
    starts_in_stream = [len(path) - length for path, length in zip(paths, lengths, strict=True)]
    columns = [_trained_columns(t, rows, on_length) for t, rows in zip(trajectories, rows_of, strict=True)]
    return Batch(
        tokens_T=np.concatenate([segment.tokens_T for _, segment in packed]),
        positions_T=_concatenate_ranges(np.array(starts_in_stream), np.array(lengths)).astype(np.int32),
        segment_length_S=np.array(lengths, np.int32),
        segment_above_S=np.array(above, np.int32),
        stream_segment_L=stream_segment_L,
        stream_episode_L=np.array([one.episode for one in sampled], np.int32),
        target_N=np.concatenate([c.target_N for c in columns]),
        row_N=np.concatenate([c.row_N for c in columns]),
        old_logprobs_N=np.concatenate([c.old_logprobs_N for c in columns]),
        rewards_N=np.concatenate([c.rewards_N for c in columns]),
        loss_mask_N=np.concatenate([c.loss_mask_N for c in columns]),
        episode_length_E=np.array([len(c.target_N) for c in columns], np.int32),
        bootstrap_row_E=bootstrap_row_E,
        group_E=np.array([groups[t.prompt.group_id] for t in trajectories], np.int32),
        index_E=np.arange(len(trajectories), dtype=np.int32),
        episodes_total=len(trajectories),
    )


@dataclass(frozen=True, eq=False)
class _Columns:
    """The trained tokens of one episode, over all its streams, in the order in which they were sampled."""

    target_N: NDArray[np.int32]
    row_N: NDArray[np.int32]
    old_logprobs_N: NDArray[np.float32]
    rewards_N: NDArray[np.float32]
    loss_mask_N: NDArray[np.bool_]


def _trained_columns(
    trajectory: Trajectory, rows_of_stream: dict[int, NDArray[np.int32]], on_length: OnLength
) -> _Columns:
    positions = [np.flatnonzero(stream.trained_T) for stream in trajectory.streams]
    before = np.cumsum([0, *map(len, positions)])
    rewards_N = np.zeros(int(before[-1]), np.float32)
    for turn in trajectory.turns:
        # The reward of a turn falls on its last token; a turn without tokens hands it to the token before it.
        tokens = int(before[turn.stream]) + int(np.searchsorted(positions[turn.stream], turn.end))
        rewards_N[max(tokens - 1, 0)] += turn.reward
    masked = on_length == "mask" and _hit_length(trajectory)
    parts = [(trajectory.streams[n], positions[n], rows) for n, rows in sorted(rows_of_stream.items())]
    return _Columns(
        target_N=np.concatenate([stream.token_ids_T[at] for stream, at, _ in parts]),
        row_N=np.concatenate([rows[at - 1] for _, at, rows in parts]),
        old_logprobs_N=np.concatenate([stream.logprobs_T[at] for stream, at, _ in parts]),
        rewards_N=rewards_N,
        loss_mask_N=np.full(len(rewards_N), not masked),
    )


def _new_numbers(kept: NDArray[np.intp], count: int) -> NDArray[np.int32]:
    """Of things that had numbers below `count` and of which these are kept: the new number by the old one."""
    numbers = np.full(count + 1, NO_ROW, np.int32)  # The spare last slot maps NO_ROW to itself.
    numbers[kept] = np.arange(len(kept), dtype=np.int32)
    return numbers


def _concatenate_ranges(starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.intp]:
    """`concatenate([arange(s, s + n) for s, n in ...])` without the loop."""
    ends = np.cumsum(lengths)
    offsets = np.repeat(starts - (ends - lengths), lengths)
    ranges: NDArray[np.intp] = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.intp) + offsets
    return ranges


def nbytes(batch: Batch) -> int:
    """Bytes of all columns: what travels to a learner."""
    return sum(value.nbytes for f in fields(batch) if isinstance(value := getattr(batch, f.name), np.ndarray))
