"""Weights of older samples against the formulas, answer by answer; what is not finite stays inside bounds."""

import itertools
import math

import numpy as np
import pytest
import torch

from rollcast_learners.advantages import moments
from rollcast_learners.correction import effective_share, weights

KINDS = ("decoupled", "token_tis", "sequence_tis", "token_mask", "sequence_mask")


def expected(kind: str, gaps: list[list[float]], masks: list[list[bool]], low: float, high: float) -> list[float]:
    found = []
    for answer, mask in zip(gaps, masks, strict=True):
        kept = [gap if use else 0.0 for gap, use in zip(answer, mask, strict=True)]
        whole = math.exp(max(-20.0, min(20.0, sum(kept))))
        for gap in kept:
            w = math.exp(max(-20.0, min(20.0, gap)))
            rule = {
                "decoupled": w,
                "token_tis": min(w, high),
                "sequence_tis": min(whole, high),
                "token_mask": w if low <= w <= high else 0.0,
                "sequence_mask": whole if whole <= high else 0.0,
            }
            found.append(rule[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_the_formula_on_1000_random_batches(kind: str) -> None:
    rng = np.random.default_rng(4)
    for _ in range(1000):
        lengths = rng.integers(1, 9, rng.integers(1, 6))
        gaps = [rng.normal(scale=0.6, size=n).tolist() for n in lengths]
        masks = [(rng.random(n) < 0.8).tolist() for n in lengths]
        gap_T, mask_T = (torch.tensor(list(itertools.chain(*column))) for column in (gaps, masks))
        behaviour_T = torch.full_like(gap_T, -2.0)
        ours = weights(kind, behaviour_T + gap_T, behaviour_T, mask_T, torch.from_numpy(lengths), 0.5, 2.0)
        theirs = torch.tensor(expected(kind, gaps, masks, 0.5, 2.0))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [100.0, -100.0, math.inf, -math.inf])
def test_extreme_ratios_give_finite_weights(kind: str, gap: float) -> None:
    proximal_T = torch.tensor([-1.0 + gap, -1.0])
    ours = weights(kind, proximal_T, torch.full((2,), -1.0), torch.ones(2), torch.tensor([1, 1]), 0.5, 2.0)
    assert ours.isfinite().all() and (ours >= 0).all() and ours[1] == 1
    assert kind == "decoupled" or ours.max() <= 2.0


def test_masked_garbage_weighs_on_nobody() -> None:
    proximal_T, mask_T = torch.tensor([math.nan, -1.0]), torch.tensor([False, True])
    ours = weights("sequence_tis", proximal_T, torch.full((2,), -1.0), mask_T, torch.tensor([2]), 0.5, 2.0)
    assert ours.tolist() == [1.0, 1.0]


def test_without_a_correction_all_count_alike() -> None:
    assert (
        weights("none", torch.randn(3), torch.randn(3), torch.ones(3), torch.tensor([3]), 0.5, 2.0).tolist() == [1] * 3
    )


def test_an_unknown_correction_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'ppo'.*token_tis.*buffer.correction"):
        weights("ppo", *torch.zeros(3, 1), torch.tensor([1]), 0.5, 2.0)  # type: ignore[arg-type]


def test_the_effective_share_is_one_for_equal_weights_and_adds_up_over_learners() -> None:
    ones, mask = torch.ones(8), torch.ones(8, dtype=torch.bool)
    assert effective_share(moments(3 * ones, mask)) == pytest.approx(1.0)
    assert effective_share(moments(0 * ones, mask)) == 0.0
    uneven = torch.arange(8.0)
    halves = moments(uneven[:3], mask[:3]) + moments(uneven[3:], mask[3:])
    assert effective_share(halves) == pytest.approx(28**2 / (8 * 140))
    assert effective_share(moments(uneven, uneven == 7)) == pytest.approx(1.0)
