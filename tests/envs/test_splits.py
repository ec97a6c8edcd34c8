"""The split of a group is fixed for ever, about 80 / 10 / 10, and independent of the order within it."""

from collections import Counter

import pytest

from rollcast_envs.splits import position, split_of, valid_split


def test_shares() -> None:
    counts = Counter(split_of(f"group {number}") for number in range(20_000))
    assert {name: round(count / 20_000, 2) for name, count in counts.items()} == {
        "train": 0.8,
        "validation": 0.1,
        "test": 0.1,
    }


def test_assignments_of_released_data_do_not_move() -> None:
    pinned = {"country:FR": "train", "country:IN": "validation", "country:CZ": "test", "東京": "train"}
    assert {name: split_of(name) for name in pinned} == pinned


def test_order_is_fixed_and_mixes_splits() -> None:
    names = sorted((f"group {number}" for number in range(1000)), key=position)
    assert names != sorted(names)
    assert len({split_of(name) for name in names[:100]}) == 3


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="'dev'; expected one of train, validation, test"):
        valid_split("dev")
