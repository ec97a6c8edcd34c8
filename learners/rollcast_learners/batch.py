"""Trajectories become one packed batch: `collate`, and `Batch.select` to cut it into smaller ones.

Owns: the packed layout. Does not know torch, losses or advantages.

Layout. The samples of one question begin with the same tokens, so a batch holds each such *prefix* once,
followed by the *tails* that continue it: `[prefix][tail][tail]...[prefix][tail]...`. A tail attends to its
prefix and to itself, which gives the same numbers as one full sequence a sample, for a fraction of the tokens
(Prefix Grouper, arXiv 2506.05433). No padding anywhere.

Legend: E episodes, P prefixes, S tails, T packed tokens, N trained tokens (sampled by the policy, in
episode order).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rollcast_learners.types import Stream, Trajectory

OnLength = Literal["zero", "bootstrap", "mask"]
NO_ROW = -1


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed, ragged, opaque to every library. Collate -> learner."""

    tokens_T: NDArray[np.int32]
    positions_T: NDArray[np.int32]
    prefix_start_P: NDArray[np.int32]
    prefix_length_P: NDArray[np.int32]
    tail_prefix_S: NDArray[np.int32]
    tail_start_S: NDArray[np.int32]
    tail_length_S: NDArray[np.int32]
    """May be 0: a sample's last token is only a target, so a one-token answer needs no row of its own."""
    tail_episode_S: NDArray[np.int32]
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

    def select(self, episodes: NDArray[np.intp]) -> "Batch":
        """The batch of these episodes alone (ascending indices), packed afresh."""
        tails = np.flatnonzero(np.isin(self.tail_episode_S, episodes))
        prefixes = np.unique(self.tail_prefix_S[tails])
        starts, lengths = self._segments(prefixes, tails)
        rows = _concatenate_ranges(starts, lengths)
        new_row_T = np.full(self.tokens + 1, NO_ROW, np.int32)  # The spare last slot maps NO_ROW to itself.
        new_row_T[rows] = np.arange(len(rows), dtype=np.int32)
        new_prefix = np.searchsorted(prefixes, self.tail_prefix_S[tails]).astype(np.int32)
        trained = self.trained_of(episodes)
        return Batch(
            tokens_T=self.tokens_T[rows],
            positions_T=self.positions_T[rows],
            prefix_start_P=new_row_T[self.prefix_start_P[prefixes]],
            prefix_length_P=self.prefix_length_P[prefixes],
            tail_prefix_S=new_prefix,
            tail_start_S=_tail_starts(self.prefix_length_P[prefixes], new_prefix, self.tail_length_S[tails]),
            tail_length_S=self.tail_length_S[tails],
            tail_episode_S=np.searchsorted(episodes, self.tail_episode_S[tails]).astype(np.int32),
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
        return replace(self, tokens_T=zero, positions_T=zero, prefix_start_P=zero, prefix_length_P=one)

    def _segments(
        self, prefixes: NDArray[np.integer], tails: NDArray[np.intp]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Starts and lengths of the given segments in packed order: each prefix before its tails."""
        starts = np.concatenate([self.prefix_start_P[prefixes], self.tail_start_S[tails]])
        lengths = np.concatenate([self.prefix_length_P[prefixes], self.tail_length_S[tails]])
        owner = np.concatenate([prefixes, self.tail_prefix_S[tails]])
        order = np.argsort(owner, kind="stable")
        return starts[order], lengths[order]

    def shares(self, count: int) -> list["Batch"]:
        """One share a learner, balanced by packed rows; groups stay whole, to be normalised locally.

        A share is empty only if there are fewer groups than learners.
        """
        rows_E = np.bincount(self.tail_episode_S, self.tail_length_S, self.episodes).astype(np.int64)
        first_tails = np.unique(self.tail_prefix_S, return_index=True)[1]
        rows_E += np.bincount(self.tail_episode_S[first_tails], self.prefix_length_P, self.episodes).astype(np.int64)
        groups, group_of_E = np.unique(self.group_E, return_inverse=True)
        rows_G = np.bincount(group_of_E, rows_E, len(groups))
        loads, owner_G = np.zeros(count), np.zeros(len(groups), np.int64)
        for group in np.argsort(-rows_G, kind="stable"):
            owner_G[group] = np.argmin(loads)
            loads[owner_G[group]] += rows_G[group]
        return [self.select(np.flatnonzero(owner_G[group_of_E] == rank)) for rank in range(count)]

    def microbatches(self, token_budget: int) -> list[NDArray[np.intp]]:
        """Episode indices of parts of at most `token_budget` packed rows (one episode alone may exceed it).

        Walks the episodes in packed order, so that those sharing a prefix stay together.
        """
        parts: list[list[int]] = []
        budget, current = 0, set[int]()
        for episode, prefixes, tail_tokens in self._episode_costs():
            new = tail_tokens + sum(int(self.prefix_length_P[p]) for p in prefixes if p not in current)
            if not parts or budget + new > token_budget:
                parts.append([])
                budget, current = 0, set()
                new = tail_tokens + sum(int(self.prefix_length_P[p]) for p in prefixes)
            parts[-1].append(episode)
            budget += new
            current.update(prefixes)
        return [np.sort(np.array(part, np.intp)) for part in parts]

    def _episode_costs(self) -> list[tuple[int, set[int], int]]:
        costs: dict[int, tuple[set[int], int]] = {}
        for prefix, episode, length in zip(
            self.tail_prefix_S.tolist(),
            self.tail_episode_S.tolist(),
            self.tail_length_S.tolist(),
            strict=True,
        ):
            prefixes, tokens = costs.get(episode, (set(), 0))
            costs[episode] = (prefixes | {prefix}, tokens + length)
        return [(episode, prefixes, tokens) for episode, (prefixes, tokens) in costs.items()]


@dataclass(frozen=True, eq=False)
class _Tail:
    """One stream seen from its prefix: which tokens follow it, and which of them are trained."""

    episode: int
    number: int
    """Of the stream among those of its episode."""
    stream: Stream
    prefix_length: int
    keep_last: bool

    @property
    def rows(self) -> int:
        return len(self.stream.token_ids_T) - self.prefix_length - (0 if self.keep_last else 1)


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
    prefix_of: dict[tuple[str, bytes], int] = {}
    tails_of: list[list[_Tail]] = []
    for episode, trajectory in enumerate(trajectories):
        sampled = [number for number, stream in enumerate(trajectory.streams) if stream.trained_T.any()]
        for number in sampled:
            stream = trajectory.streams[number]
            length = int(np.argmax(stream.trained_T))
            key = (trajectory.prompt.group_id, stream.token_ids_T[:length].tobytes())
            prefix = prefix_of.setdefault(key, len(prefix_of))
            if prefix == len(tails_of):
                tails_of.append([])
            keep_last = number == sampled[-1] and _continues(trajectory, on_length)
            tails_of[prefix].append(_Tail(episode, number, stream, length, keep_last))
    return _pack(trajectories, tails_of, groups, on_length)


def _continues(trajectory: Trajectory, on_length: OnLength) -> bool:
    """Whether the value of the state after the last token stands for the rewards that were cut off."""
    return trajectory.truncated or (on_length == "bootstrap" and _hit_length(trajectory))


def _hit_length(trajectory: Trajectory) -> bool:
    return trajectory.turns[-1].finish_reason == "length"


def _pack(
    trajectories: Sequence[Trajectory],
    tails_of: list[list[_Tail]],
    groups: dict[str, int],
    on_length: OnLength,
) -> Batch:
    prefix_length_P = np.array([tails[0].prefix_length for tails in tails_of], np.int32)
    flat = [(prefix, tail) for prefix, tails in enumerate(tails_of) for tail in tails]
    tail_prefix_S = np.array([prefix for prefix, _ in flat], np.int32)
    tail_length_S = np.array([tail.rows for _, tail in flat], np.int32)
    tail_start_S = _tail_starts(prefix_length_P, tail_prefix_S, tail_length_S)
    first_tail_P = np.searchsorted(tail_prefix_S, np.arange(len(tails_of)))
    prefix_start_P = tail_start_S[first_tail_P] - prefix_length_P

    tokens_T = np.empty(int(prefix_length_P.sum() + tail_length_S.sum()), np.int32)
    positions_T = np.empty_like(tokens_T)
    rows_of: list[dict[int, NDArray[np.int32]]] = [{} for _ in trajectories]
    bootstrap_row_E = np.full(len(trajectories), NO_ROW, np.int32)
    for (prefix, tail), start in zip(flat, tail_start_S.tolist(), strict=True):
        head, length = int(prefix_start_P[prefix]), tail.prefix_length
        tokens_T[head : head + length] = tail.stream.token_ids_T[:length]
        positions_T[head : head + length] = np.arange(length)
        tokens_T[start : start + tail.rows] = tail.stream.token_ids_T[length : length + tail.rows]
        positions_T[start : start + tail.rows] = np.arange(length, length + tail.rows)
        row_of_token = np.concatenate([np.arange(head, head + length), np.arange(start, start + tail.rows + 1)])
        rows_of[tail.episode][tail.number] = row_of_token.astype(np.int32)
        if tail.keep_last:
            bootstrap_row_E[tail.episode] = start + tail.rows - 1
    columns = [_trained_columns(t, rows, on_length) for t, rows in zip(trajectories, rows_of, strict=True)]
    return Batch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        prefix_start_P=prefix_start_P.astype(np.int32),
        prefix_length_P=prefix_length_P,
        tail_prefix_S=tail_prefix_S,
        tail_start_S=tail_start_S,
        tail_length_S=tail_length_S,
        tail_episode_S=np.array([tail.episode for _, tail in flat], np.int32),
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


def _tail_starts(
    prefix_length_P: NDArray[np.int32], tail_prefix_S: NDArray[np.int32], tail_length_S: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Where each tail begins when every prefix is followed by its tails (tails are ordered by prefix)."""
    tokens_before = np.cumsum(tail_length_S) - tail_length_S
    prefixes_so_far = np.cumsum(prefix_length_P)[tail_prefix_S]
    starts: NDArray[np.int32] = (tokens_before + prefixes_so_far).astype(np.int32)
    return starts


def _concatenate_ranges(starts: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.intp]:
    """`concatenate([arange(s, s + n) for s, n in ...])` without the loop."""
    ends = np.cumsum(lengths)
    offsets = np.repeat(starts - (ends - lengths), lengths)
    ranges: NDArray[np.intp] = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.intp) + offsets
    return ranges


def nbytes(batch: Batch) -> int:
    """Bytes of all columns: what travels to a learner."""
    return sum(value.nbytes for f in fields(batch) if isinstance(value := getattr(batch, f.name), np.ndarray))
