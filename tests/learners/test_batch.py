"""Packing: what collate makes of trajectories, and that cutting a batch loses and invents nothing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollcast_learners.batch import NO_ROW, Batch, collate, nbytes, usable
from rollcast_learners.prefix_tree import PrefixTree
from trajectories import answer, episode, expected, random_episodes, stream, unpack

EXAMPLES = settings(max_examples=60, deadline=None)
Seeds = st.integers(0, 2**32 - 1)
Shapes = st.tuples(Seeds, st.integers(1, 4), st.integers(1, 5))


def some_batch(shape: tuple[int, int, int]) -> Batch:
    return collate(random_episodes(*shape))


def test_a_shared_prompt_is_stored_once_and_last_tokens_need_no_row():
    batch = collate([answer([7, 8, 9], [1, 2, 3]), answer([7, 8, 9], [4]), answer([5], [6, 1], group="1")])
    assert batch.tokens_T.tolist() == [7, 8, 9, 1, 2, 5, 6]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.segment_length_S.tolist() == [3, 2, 2]
    assert batch.segment_above_S.tolist() == [NO_ROW, 0, NO_ROW]
    assert batch.stream_segment_L.tolist() == [1, 0, 2]
    assert batch.row_N.tolist() == [2, 3, 4, 2, 5, 6]
    assert batch.target_N.tolist() == [1, 2, 3, 4, 6, 1]
    assert batch.group_E.tolist() == [0, 0, 1]
    assert (batch.episodes, batch.tokens, batch.trained_tokens) == (3, 7, 6)


def test_different_questions_share_their_system_prompt_and_answers_their_first_words():
    system = [1, 2, 3]
    batch = collate(
        [
            answer([*system, 10, 11], [20, 21, 22], group="0"),
            answer([*system, 10, 11], [20, 21, 23, 24], group="0", number=1),
            answer([*system, 12], [20], group="1"),
        ]
    )
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 11, 20, 21, 23, 12]
    assert batch.segment_length_S.tolist() == [3, 4, 1, 1]
    assert batch.segment_above_S.tolist() == [NO_ROW, 0, 1, 0]
    assert batch.seen_until_T.tolist() == [9, 9, 9, 8, 8, 8, 8, 8, 9]


def test_equal_samples_cost_the_rows_of_one():
    one = collate([answer([1, 2], [3, 4, 5])])
    assert collate([answer([1, 2], [3, 4, 5], group=str(n)) for n in range(8)]).tokens == one.tokens


def test_what_follows_the_last_trained_token_needs_no_row():
    batch = collate([episode([[([1, 2], False), ([3, 4], True), ([5, 6, 7], False)]], [1.0])])
    assert batch.tokens_T.tolist() == [1, 2, 3]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
def test_a_tree_holds_its_sequences_and_nothing_twice(sequences):
    tree = PrefixTree()
    for number, sequence in enumerate(sequences):
        tree.add(number, np.array(sequence, np.int32))
    said, found = [], {}
    for above, segment in tree.packed():
        said.append([*(said[above] if above >= 0 else []), *segment.tokens_T.tolist()])
        found |= dict.fromkeys(segment.ends, said[-1])
    assert found == dict(enumerate(sequences))
    rows = sum(len(segment.tokens_T) for _, segment in tree.packed())
    assert rows == len({tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))})


@pytest.mark.parametrize("on_length", ["zero", "bootstrap", "mask"])
@EXAMPLES
@given(shape=Shapes)
def test_a_batch_means_its_trajectories(on_length, shape):
    trajectories = random_episodes(*shape)
    batch = collate(trajectories, on_length)
    assert unpack(batch) == [expected(trajectory, on_length) for trajectory in trajectories]
    assert batch.index_E.tolist() == list(range(len(trajectories)))
    assert batch.episodes_total == len(trajectories)
    assert np.isclose(batch.rewards_N.sum(), sum(t.reward for t in trajectories), atol=1e-4)


def test_streams_keep_their_order_when_a_later_one_shares_a_prefix_seen_before():
    # The second episode's first prompt is new, its second is one the first episode brought in.
    first = episode([[([1, 2], False), ([3], True)], [([4, 5], False), ([6], True)]], [1.0, 2.0])
    second = episode([[([9, 9], False), ([7], True)], [([4, 5], False), ([8], True)]], [3.0, 4.0], number=1)
    batch = collate([first, second])
    assert batch.target_N.tolist() == [3, 6, 7, 8]
    assert batch.rewards_N.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert unpack(batch) == [expected(first), expected(second)]


def test_the_reward_of_a_turn_falls_on_its_last_token():
    turns = episode([[([1], False), ([2, 3], True), ([4], False), ([5, 6, 7], True)]], [0.5, 2.0])
    assert collate([turns]).rewards_N.tolist() == [0, 0.5, 0, 0, 2.0]


def test_a_turn_without_tokens_hands_its_reward_to_the_token_before_it():
    silent = episode([[([1], False), ([2, 3], True), ([4], False), ([], True)]], [0.5, 2.0])
    assert collate([silent]).rewards_N.tolist() == [0, 2.5]
    first = episode([[([1], False), ([], True), ([4], False), ([5, 6], True)]], [0.5, 2.0])
    assert collate([first]).rewards_N.tolist() == [0.5, 2.0]


def test_a_stream_without_sampled_tokens_hands_its_reward_to_the_stream_before_it():
    between = episode(
        [[([1], False), ([2], True)], [([3], False), ([], True)], [([4], False), ([5, 6], True)]], [1.0, 2.0, 4.0]
    )
    assert collate([between]).rewards_N.tolist() == [3.0, 0, 4.0]


def test_truncation_bootstraps_from_the_whole_of_the_last_sampled_stream():
    plain = answer([1, 2], [3, 4], truncated=True)
    assert unpack(collate([plain]))[0].bootstrap == (1, 2, 3, 4)
    silent = episode([[([1], False), ([2], True)], [([3], False), ([], True)]], [1.0, 0.0], truncated=True)
    assert unpack(collate([silent]))[0].bootstrap == (1, 2)


@pytest.mark.parametrize("on_length, bootstraps, trained", [("zero", 0, 4), ("bootstrap", 1, 4), ("mask", 0, 2)])
def test_running_into_the_token_limit_is_ruled_by_on_length(on_length, bootstraps, trained):
    batch = collate([answer([1], [2, 3]), answer([1], [4, 5], finish="length")], on_length)
    assert sum(row >= 0 for row in batch.bootstrap_row_E) == bootstraps
    assert batch.trained_tokens == trained


BAD = {
    "an error": answer([1], [2], error="the environment raised"),
    "no sampled token": episode([[([1], False), ([], True)]], [1.0]),
    "a NaN reward": answer([1], [2], float("nan")),
    "an infinite reward": answer([1], [2], float("inf")),
    "a NaN log-probability": answer([1], [2], logprobs=[float("nan")]),
    "a log-probability of -inf": answer([1], [2], logprobs=[-float("inf")]),
    "a first token that nothing predicts": dataclasses.replace(answer([1], [2]), streams=(stream(([2, 3], True)),)),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_trajectories_are_known_and_refused(name):
    assert usable(answer([1], [2]))
    assert not usable(BAD[name])
    with pytest.raises(ValueError, match="not usable"):
        collate([answer([1], [2]), BAD[name]])


def test_collating_nothing_is_refused():
    with pytest.raises(ValueError, match="0 trajectories"):
        collate([])


@EXAMPLES
@given(shape=Shapes, chosen=Seeds)
def test_select_keeps_the_meaning_of_what_it_keeps(shape, chosen):
    batch = some_batch(shape)
    keep = np.flatnonzero(np.random.default_rng(chosen).random(batch.episodes) < 0.5)
    selected = batch.select(keep)
    assert unpack(selected) == [unpack(batch)[e] for e in keep]
    assert selected.index_E.tolist() == batch.index_E[keep].tolist()
    assert selected.group_E.tolist() == batch.group_E[keep].tolist()
    assert selected.episodes_total == batch.episodes_total
    again = np.arange(0, len(keep), 2)
    assert unpack(selected.select(again)) == [unpack(batch)[e] for e in keep[again]]


@EXAMPLES
@given(shape=Shapes)
def test_select_of_everything_changes_nothing(shape):
    batch = some_batch(shape)
    same = batch.select(np.arange(batch.episodes))
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(same, field.name), getattr(batch, field.name))


@EXAMPLES
@given(shape=Shapes, count=st.integers(1, 5))
def test_shares_hold_every_episode_once_with_groups_whole(shape, count):
    batch = some_batch(shape)
    shares = batch.shares(count)
    assert len(shares) == count
    assert sorted(i for share in shares for i in share.index_E.tolist()) == list(range(batch.episodes))
    whole = unpack(batch)
    for share in shares:
        assert unpack(share) == [whole[i] for i in share.index_E]
    homes = [set(share.group_E.tolist()) for share in shares]
    groups = len(set(batch.group_E.tolist()))
    assert sum(len(home) for home in homes) == groups
    assert sum(not home for home in homes) == max(count - groups, 0)


def test_shares_are_balanced_by_rows():
    rng = np.random.default_rng(0)
    batch = collate(
        [
            answer([g], rng.integers(0, 9, rng.integers(1, 60)).tolist(), group=str(g), number=n)
            for g in range(40)
            for n in range(4)
        ]
    )
    loads = [share.tokens for share in batch.shares(4)]
    assert sum(loads) == batch.tokens
    assert max(loads) - min(loads) <= 0.05 * max(loads)


@EXAMPLES
@given(shape=Shapes, budget=st.integers(1, 80))
def test_microbatches_hold_every_episode_once_within_the_budget(shape, budget):
    batch = some_batch(shape)
    parts = batch.microbatches(budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(batch.episodes))
    for part in parts:
        assert part.tolist() == sorted(part)
        assert len(part) == 1 or batch.select(part).tokens <= budget
    trained = np.concatenate([batch.trained_of(part) for part in parts])
    assert sorted(trained.tolist()) == list(range(len(batch.target_N)))


def test_one_microbatch_when_everything_fits():
    batch = some_batch((1, 4, 5))
    assert len(batch.microbatches(batch.tokens)) == 1


def test_nothing_is_a_batch_too():
    nothing = some_batch((0, 2, 2)).select(np.array([], np.intp))
    assert (nothing.episodes, nothing.tokens, nothing.trained_tokens) == (0, 0, 0)
    assert nothing.microbatches(10) == []
    assert nothing.episodes_total == 4
    assert nothing.select(np.array([], np.intp)).episodes == 0


def test_nbytes_counts_every_column():
    batch = collate([answer([1, 2], [3])])
    columns = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    assert nbytes(batch) == sum(column.nbytes for column in columns if isinstance(column, np.ndarray))
