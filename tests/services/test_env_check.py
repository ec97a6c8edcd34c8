"""`rollcast env check`: one bad environment for each finding, and none of the built-in ones is at fault."""

import json
import random
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import bad_envs
import faulty_envs
from rollcast.env_check import Finding, Limits, Report, check
from rollcast.environments import register_environments
from rollcast.errors import UsageError

FEW = Limits(episodes=4, max_turns=5, timeout_s=30.0)
HURRIED = Limits(episodes=2, max_turns=3, timeout_s=0.3)


def bad(name: str, limits: Limits = FEW, **kwargs: Any) -> Report:
    return check(f"bad/{name}-v0", kwargs, limits)


def named(report: Report) -> list[tuple[str, str]]:
    return sorted((finding.level, finding.name) for finding in report.findings)


def only(report: Report, name: str) -> Finding:
    found = [finding for finding in report.findings if finding.name == name]
    assert len(found) == 1, report.findings
    return found[0]


def test_there_is_nothing_to_say_about_a_good_one() -> None:
    report = bad("Good")
    assert report.findings == []
    assert not report.failed
    assert (report.episodes, report.turns) == (4, 12)
    assert max(report.rewards) == 3.0, "references are tried as answers"


@pytest.mark.parametrize(
    ("name", "level", "finding"),
    [
        ("IgnoresSeed", "error", "seed"),
        ("CarriesOver", "error", "carries over"),
        ("OneEpisode", "warning", "one episode"),
        ("NeverEnds", "error", "never ends"),
        ("RarelyEnds", "warning", "never ends"),
        ("GoesOn", "warning", "steps after the end"),
        ("BadReferences", "error", "types"),
        ("SmallObservations", "error", "spaces"),
        ("LettersOnly", "error", "spaces"),
        ("NeedsWords", "error", "hostile answers"),
        ("AsciiOnly", "error", "hostile answers"),
        ("Raises", "error", "raises"),
        ("SeedByDefault", "warning", "gymnasium"),
        ("SeedsProcess", "warning", "global randomness"),
    ],
)
def test_each_mistake_has_its_finding(name: str, level: str, finding: str) -> None:
    report = bad(name)
    found = next(each for each in report.findings if each.name == finding)
    assert found.level == level
    assert all((found.what, found.why, found.do_this))
    assert report.failed == any(each.level == "error" for each in report.findings)
    assert json.loads(json.dumps(asdict(report)))["findings"]


def test_spaces_that_are_missing_hide_nothing_else() -> None:
    report = bad("NoSpaces")
    assert {finding.what for finding in report.findings if finding.name == "spaces"} == {
        "there is no observation_space",
        "there is no action_space",
    }
    assert report.episodes == 4 and not report.failed


def test_the_process_s_random_numbers_are_an_error_where_they_decide() -> None:
    report = bad("DrawsFromProcess")
    assert ("error", "global randomness") in named(report)
    assert "seed" not in {finding.name for finding in report.findings}


def test_the_process_s_random_numbers_stay_as_they_were() -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).random()
    bad("Good")
    assert (random.random(), np.random.random()) == expected


def test_hostile_answers_are_named() -> None:
    assert "an empty answer" in only(bad("NeedsWords"), "hostile answers").what
    what = only(bad("AsciiOnly"), "hostile answers").what
    assert "UnicodeEncodeError" in what and ("emoji" in what or "Chinese" in what)


@pytest.mark.parametrize("how", ["not a tuple", "observation 7", "info None"])
def test_wrong_types_from_reset(how: str) -> None:
    report = check("faulty/Broken-v0", {"at": "reset", "how": how}, FEW)
    assert only(report, "types").what.startswith("reset returned ")


@pytest.mark.parametrize("how", ["four values", "reward NaN", "reward string", "terminated None", "metric string"])
def test_wrong_types_from_step(how: str) -> None:
    report = check("faulty/Broken-v0", {"at": "step", "how": how}, FEW)
    assert only(report, "types").what.startswith("step returned ")


@pytest.mark.parametrize("how", faulty_envs.RAISED)
def test_what_making_raises(how: str) -> None:
    found = only(check("faulty/Broken-v0", {"at": "make", "how": how}, FEW), "make")
    assert type(faulty_envs.RAISED[how]).__name__ in found.what
    assert "--kwargs" in found.do_this


def test_wrong_arguments_are_a_finding() -> None:
    assert "unexpected keyword argument 'colour'" in only(bad("Good", colour="red"), "make").what


@pytest.mark.parametrize("at", ["make", "reset", "step"])
def test_a_hang_ends_the_check(at: str) -> None:
    started = time.monotonic()
    report = check("faulty/Broken-v0", {"at": at, "how": "hang", "hang_s": 2.0}, HURRIED)
    found = only(report, "hangs")
    assert (found.level, found.what) == ("error", f"{at} did not return within 0.3 s")
    assert time.monotonic() - started < 10


def test_a_hang_on_one_answer_is_found_too() -> None:
    what = only(bad("HangsOnLong", HURRIED), "hostile answers").what
    assert "10,000 characters" in what and "did not return within 0.3 s" in what


def test_an_unknown_environment_is_no_finding() -> None:
    for env_id in ("bad/Nothing-v0", "nowhere_at_all:Nothing-v0", "bad/Good-v7", "no id"):
        with pytest.raises(UsageError, match="there is no environment"):
            check(env_id, {}, FEW)


def test_no_thread_stays_behind() -> None:
    before = set(threading.enumerate())
    bad("NeedsWords")
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


register_environments()
BUILT_IN = sorted(env_id for env_id in gymnasium.registry if env_id.startswith("rollcast/"))
NEEDS = {"rollcast/ReasoningGym-v0": "reasoning_gym", "rollcast/TextArena-v0": "textarena"}
GIVEN: dict[str, dict[str, Any]] = {"rollcast/SkyRLGym-v0": {"env": "skyrl_shape:Guess", "prompt": "Guess."}}


@pytest.mark.parametrize("env_id", BUILT_IN)
def test_the_built_in_environments_are_not_at_fault(env_id: str, tmp_path: Path) -> None:
    if env_id in NEEDS:
        pytest.importorskip(NEEDS[env_id])
    given = GIVEN.get(env_id, {})
    if env_id == "rollcast/Feedback-v0":  # It has no data of its own.
        row = {
            "split": "train",
            "question": "Capital of Peru?",
            "references": ["Lima"],
            "judged": [{"answer": "Lima", "value": 1.0}],
        }
        given = {"data": str(tmp_path / "feedback.jsonl")}
        Path(given["data"]).write_text(json.dumps(row) + "\n", encoding="utf-8")
    report = check(env_id, given, Limits(episodes=3, max_turns=20, timeout_s=120.0))
    assert [finding for finding in report.findings if finding.level == "error"] == []
    assert report.episodes == 3


def test_bad_environments_are_what_they_say() -> None:
    """The well-behaved one earns its reward, so that what the others are blamed for is their own mistake."""
    env = gymnasium.make("bad/Good-v0")
    question, info = env.reset(seed=3)
    assert question == f"Say {info['references'][0]}."
    assert env.step(info["references"][0])[1] == 1.0
    assert isinstance(env.unwrapped, bad_envs.Good)
