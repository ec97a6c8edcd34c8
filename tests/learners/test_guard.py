"""The numeric guard: what is skipped, what is remembered, when it gives up; which samples are usable."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollcast_learners.guard import Diverged, NumericGuard, Verdict, clip_rewards, finite_sequences

NAN, INF = float("nan"), float("inf")
Steps = st.lists(st.tuples(st.booleans(), st.floats(0, 1e6) | st.sampled_from([NAN, INF])), max_size=150)


def experienced() -> NumericGuard:
    guard = NumericGuard()
    for _ in range(8):
        assert guard.decide(True, 2.0) is Verdict.STEP
    return guard


@pytest.mark.parametrize("finite, norm", [(False, 1.0), (True, NAN), (True, INF), (True, -INF), (False, NAN)])
def test_non_finite_steps_are_skipped_and_counted(finite, norm):
    guard = NumericGuard()
    assert guard.decide(finite, norm) is Verdict.SKIP
    assert guard.skipped == 1
    assert guard.decide(True, 1.0) is Verdict.STEP


def test_a_spike_is_skipped_only_with_enough_history():
    guard = NumericGuard()
    for norm in [1.0] * 6 + [1e5]:
        assert guard.decide(True, norm) is Verdict.STEP
    guard = experienced()
    assert guard.decide(True, 200.0) is Verdict.STEP
    assert guard.decide(True, 200.1) is Verdict.SKIP


def test_a_skipped_norm_does_not_move_the_median():
    guard = experienced()
    for _ in range(9):
        assert guard.decide(True, 1e9) is not Verdict.STEP
    assert guard.decide(True, 2.0) is Verdict.STEP
    assert guard.state()["norms"] == [2.0] * 9


def test_the_median_follows_what_is_accepted():
    guard = experienced()
    for _ in range(50):
        guard.decide(True, 150.0)
    assert guard.decide(True, 14_000.0) is Verdict.STEP


def test_steps_with_nothing_to_learn_do_not_make_the_next_one_a_spike():
    guard = NumericGuard()
    for _ in range(60):
        assert guard.decide(True, 0.0) is Verdict.STEP
    assert guard.decide(True, 0.5) is Verdict.STEP


def test_three_in_a_row_say_halve_once():
    guard = NumericGuard()
    verdicts = [guard.decide(False, 1.0) for _ in range(5)]
    assert verdicts == [Verdict.SKIP, Verdict.SKIP, Verdict.SKIP_AND_HALVE, Verdict.SKIP, Verdict.SKIP]
    guard.decide(True, 1.0)
    assert [guard.decide(False, 1.0) for _ in range(3)][-1] is Verdict.SKIP_AND_HALVE


def test_ten_of_a_hundred_diverge():
    guard = NumericGuard()
    for step in range(90):
        guard.decide(step % 10 != 0, 1.0)
    with pytest.raises(Diverged, match=r"10 of the last 91 .*gradient norm was nan.*learning_rate") as caught:
        guard.decide(True, NAN)
    assert guard.skipped == 10
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


def test_old_skips_are_forgiven():
    guard = NumericGuard()
    for step in range(2000):
        guard.decide(step % 12 != 0, 1.0)
    assert guard.skipped == 167


def decisions(guard: NumericGuard, steps: list[tuple[bool, float]]) -> list[str]:
    said = []
    for finite, norm in steps:
        try:
            said.append(guard.decide(finite, norm).value)
        except Diverged as diverged:
            said.append(diverged.reason)
    return said


@settings(max_examples=60, deadline=None)
@given(Steps, Steps)
def test_a_saved_guard_decides_as_the_original(before, after):
    guard, resumed = NumericGuard(), NumericGuard()
    decisions(guard, before)
    resumed.load(json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert decisions(resumed, after) == decisions(guard, after)
    assert resumed.state() == guard.state()


def test_a_foreign_state_is_refused():
    with pytest.raises(ValueError, match=r"'skips'.*expected.*NumericGuard.state"):
        NumericGuard().load({"skips": 1})


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_token_marks_its_sequence(bad):
    lengths = torch.tensor([2, 0, 3, 1])
    logprobs, values = torch.zeros(6), torch.zeros(6)
    logprobs[4], values[5] = bad, bad
    assert finite_sequences(lengths, logprobs, values).tolist() == [True, True, False, False]
    assert finite_sequences(lengths, values).tolist() == [True, True, True, False]


def test_no_sequences_and_no_columns():
    assert finite_sequences(torch.zeros(0, dtype=torch.int64), torch.zeros(0)).tolist() == []
    assert finite_sequences(torch.tensor([2, 1])).tolist() == [True, True]


def test_a_column_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"\(4,\).*expected \(3,\).*packed"):
        finite_sequences(torch.tensor([2, 1]), torch.zeros(4))


def test_rewards_are_clipped_and_counted():
    clipped, count = clip_rewards(torch.tensor([0.5, -10.0, 1e6, -INF, NAN]), 10.0)
    assert clipped[:4].tolist() == [0.5, -10.0, 10.0, -10.0] and clipped[4].isnan()
    assert count == 2


@pytest.mark.parametrize("limit", [0.0, -1.0, NAN])
def test_a_reward_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match="above 0"):
        clip_rewards(torch.zeros(1), limit)
