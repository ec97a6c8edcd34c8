"""`RewardedEnv` over built-in and third-party environments, and what a configuration of rewards may and may not say."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

import rollcast_envs  # noqa: F401  (registers rollcast/QA-v0)
from rollcast_envs import reward_pool
from rollcast_envs.errors import DataError
from rollcast_envs.rewarded import REMOTE, RewardedEnv, RewardSpec
from rollcast_envs.shaping import SHAPING

SOURCE = r'''
import re, time

def worth(answer, references, **fields): return 0.25 * len(references)
def of_fields(answer, solution, bonus=0): return float(answer == solution) + bonus
def slow(answer): time.sleep(30)
def none(answer): return None
def text(answer): return "1.0"
def nan(answer): return float("nan")
def infinite(answer): return float("inf")
def wrong_length(answers, references): return [1.0] * (len(answers) + 1)
def raises(answer): raise ValueError("no verdict")
def huge(answer): return 1e308

# As in the documentation of TRL: of completions alone, with a column, of chat messages, async, and one that abstains.
def reward_num_unique_chars(completions, **kwargs):
    """Reward function that rewards completions with more unique letters."""
    completion_contents = [completion for completion in completions]
    return [float(len(set(content))) for content in completion_contents]

def reward_ground_truth(completions, ground_truth, **kwargs):
    # Regular expression to capture content inside \boxed{}
    matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    # Reward 1 if the content is the same as the ground truth, 0 otherwise
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]

def format_reward_func(prompts, completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]

async def async_reward(prompts, completions, references, trainer_state=None, **kwargs):
    return [float(completion in accepted) for completion, accepted in zip(completions, references)]

def not_for_this_one(completions, **kwargs): return [None for _ in completions]
'''
BAD = {
    "slow": "did not return within 0.5 s",
    "none": "returned None; expected a finite number",
    "text": "returned the str '1.0'",
    "nan": "returned nan",
    "infinite": "returned inf",
    "wrong_length": "returned a list of 2 for 1 answers",
    "raises": "raised ValueError: no verdict",
    "not_for_this_one": "returned None",
}


class Riddle(gymnasium.Env[str, str]):
    """As others write them: two turns, no metrics, references and fields from `reset` alone."""

    def __init__(self, reward: Any = 0.5, parts: Any = None, end: str = "terminated") -> None:
        self.observation_space = self.action_space = gymnasium.spaces.Text(100)
        self.reward, self.parts, self.end, self.turn = reward, parts, end, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn = 0
        return "What is it?", {"references": ["egg"], "fields": {"solution": "egg", "ground_truth": "egg"}}

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        self.turn += 1
        over = self.turn == 2
        info = {} if self.parts is None else {"rewards": self.parts}
        return "And?", self.reward, over and self.end == "terminated", over and self.end == "truncated", info


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def pool_is_closed() -> Iterator[None]:
    yield
    reward_pool.shared().close()
    assert "mine" not in sys.modules


def spec(function: str, **more: Any) -> dict[str, Any]:
    return {"function": f"mine.py:{function}", "timeout_s": 60.0, "retries": 0} | more


def play(env: gymnasium.Env[str, str], answer: str = "egg") -> tuple[float, dict[str, Any]]:
    env.reset(seed=1)
    while True:
        _, reward, terminated, truncated, info = env.step(answer)
        if terminated or truncated:
            return float(reward), info


def test_parts_add_up_exactly_and_are_told_one_by_one() -> None:
    own = {"f1": 0.1, "length": -0.3}
    rewards = [spec("worth", weight=0.7), {"function": "length", "weight": -0.1}, spec("of_fields", name="right")]
    reward, info = play(RewardedEnv(Riddle(-0.2, own), rewards, own_weight=0.3))
    assert list(info["rewards"]) == ["f1", "length", "worth", "length_2", "right"]
    assert info["rewards"] == {
        "f1": 0.3 * 0.1,
        "length": 0.3 * -0.3,
        "worth": 0.7 * 0.25,
        "length_2": -0.1 * 3,
        "right": 1.0,
    }
    assert reward == sum(info["rewards"].values())
    assert info["reward_values"] == {"worth": 0.25, "length": 3.0, "right": 1.0}
    assert info["reward_seconds"].keys() == info["reward_values"].keys()
    assert all(0 <= seconds < 60 for seconds in info["reward_seconds"].values())
    assert "reward_error" not in info


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_rewards_count_on_the_step_that_ends_the_episode(end: str) -> None:
    env = RewardedEnv(Riddle(end=end), [spec("worth")], own_weight=2.0)
    env.reset()
    _, reward, terminated, truncated, info = env.step("a fish")
    assert (reward, terminated or truncated, info) == (1.0, False, {"rewards": {"task": 1.0}})
    _, reward, terminated, truncated, info = env.step("egg")
    assert (reward, terminated, truncated) == (1.25, end == "terminated", end == "truncated")
    assert info["rewards"] == {"task": 1.0, "worth": 0.25}


def test_it_works_over_the_questions_on_geography() -> None:
    env = RewardedEnv(gymnasium.make("rollcast/QA-v0"), [spec("worth"), {"function": "contains", "weight": 0.5}])
    _, opening = env.reset(options={"index": 0})
    right = opening["references"][0]
    _, reward, terminated, _, info = env.step(f"It is {right}.")
    assert terminated and reward == sum(info["rewards"].values())
    assert info["rewards"]["worth"] == 0.25 * len(opening["references"]) and info["rewards"]["contains"] == 0.5
    assert set(info["metrics"]) == {"f1", "exact_match"}  # Shaping is no metric.


def test_it_works_in_a_vector_and_over_a_wrapped_environment() -> None:
    def make() -> gymnasium.Env[str, str]:
        limited = gymnasium.wrappers.TimeLimit(Riddle(end="never"), 1)
        return RewardedEnv(limited, [spec("worth"), spec("raises")])

    vector = SyncVectorEnv([make] * 3)
    vector.reset(seed=1)
    _, rewards, _, truncated, infos = vector.step(("egg", "", "x"))
    assert truncated.all() and np.array_equal(rewards, [0.5] * 3)
    assert list(infos["reward_values"]["worth"]) == [0.25] * 3
    assert all("reward raises: raised ValueError" in error for error in infos["reward_error"])
    vector.close()


class Timeless(gymnasium.Wrapper[str, str, str, str], RecordConstructorArgs):
    """Without the one thing in `info` that no two steps have in common."""

    def __init__(self, env: gymnasium.Env[str, str]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        *result, info = self.env.step(action)
        return *result, {name: value for name, value in info.items() if name != "reward_seconds"}  # type: ignore[return-value]


def test_gymnasiums_checker_passes() -> None:
    rewards = [spec("worth"), {"function": "repetition", "weight": -1}]
    env = RewardedEnv(gymnasium.make("rollcast/QA-v0", disable_env_checker=True), rewards)
    with pytest.warns(UserWarning, match="different from the unwrapped"):
        check_env(Timeless(env), skip_render_check=True)


def test_gymnasiums_spec_makes_it_again() -> None:
    env = RewardedEnv(gymnasium.make("rollcast/QA-v0"), [spec("worth"), {"function": "contains"}], own_weight=0.5)
    assert env.spec is not None
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(again, RewardedEnv) and again.specs == env.specs
    assert play(again)[0] == play(env)[0]


@pytest.mark.parametrize("function", BAD)
def test_a_reward_that_fails_is_told_and_leaves_the_environments_own(function: str) -> None:
    before = reward_pool.shared().report()
    timeout_s = 0.5 if function == "slow" else 60.0
    env = RewardedEnv(Riddle(), [spec("worth"), spec(function, timeout_s=timeout_s)])
    reward, info = play(env)
    assert reward == 0.5 and info["rewards"] == {"task": 0.5}
    assert info["reward_error"].startswith(f"reward {function}: {BAD[function]}")
    assert info["reward_values"] == {"worth": 0.25} and set(info["reward_seconds"]) == {"worth", function}
    after = reward_pool.shared().report()
    assert after[function].failures == (before[function].failures if function in before else 0) + 1
    assert after["worth"].calls > 0 and after["worth"].failures == 0
    assert play(env)[0] == 0.5


def test_a_sum_that_is_not_finite_is_a_failure() -> None:
    reward, info = play(RewardedEnv(Riddle(), [spec("huge", weight=1e10)]))
    assert reward == 0.5 and "not finite" in info["reward_error"]
    reward, info = play(RewardedEnv(Riddle(), [spec("huge", name=name) for name in "ab"]))
    assert reward == 0.5 and "not finite" in info["reward_error"]


@pytest.mark.parametrize(
    ("function", "answer", "options", "value"),
    [
        ("reward_num_unique_chars", "abcabc", {}, 3.0),
        ("reward_ground_truth", r"It is \boxed{egg}.", {}, 1.0),
        ("reward_ground_truth", "It is egg.", {}, 0.0),
        ("format_reward_func", "<think>?</think><answer>egg</answer>", {"conversational": True}, 1.0),
        ("format_reward_func", "egg", {"conversational": True}, 0.0),
        ("async_reward", "egg", {}, 1.0),
    ],
)
def test_functions_written_for_trl_work_unchanged(
    function: str, answer: str, options: dict[str, Any], value: float
) -> None:
    _, info = play(RewardedEnv(Riddle(), [spec(function, options=options)]), answer)
    assert info["reward_values"] == {function: value}


def test_a_trl_function_for_chat_messages_says_what_to_set() -> None:
    _, info = play(RewardedEnv(Riddle(), [spec("format_reward_func")]))
    assert "set options = { conversational = true }" in info["reward_error"]


def test_a_format_that_takes_for_ever_is_a_failure() -> None:
    format_ = {"function": "format", "timeout_s": 0.5, "retries": 0, "options": {"pattern": "(a+)+$"}}
    env = RewardedEnv(Riddle(), [format_])
    _, info = play(env, "a" * 40 + "!")
    assert info["reward_error"] == "reward format: did not return within 0.5 s"
    env = RewardedEnv(Riddle(), [format_ | {"timeout_s": 60.0}])
    assert play(env, "aaa")[1]["rewards"] == {"task": 0.5, "format": 1.0}


def test_fields_never_pass_for_options_of_a_built_in() -> None:
    class Sneaky(Riddle):
        def reset(self, **kwargs: Any) -> tuple[str, dict[str, Any]]:
            return "?", {"references": "egg", "fields": {"budget": 100, "pattern": ".*", "unit": "word"}}

    rewards = [
        {"function": "length", "weight": 1.0},
        {"function": "format", "timeout_s": 60.0, "options": {"pattern": "no"}},
        {"function": "contains"},
    ]
    _, info = play(RewardedEnv(Sneaky(), rewards))
    assert info["reward_values"] == {"length": 3.0, "format": 0.0, "contains": 1.0}


@pytest.mark.parametrize("reward", [None, "1.0", math.nan, math.inf, 10**400])
def test_an_environments_own_nonsense_is_left_for_its_player_to_refuse(reward: Any) -> None:
    env = RewardedEnv(Riddle(reward), [spec("worth")])
    env.reset()
    assert env.step("egg") == ("And?", reward, False, False, {}) or math.isnan(reward)


@pytest.mark.parametrize(
    ("reward", "parts", "own"),
    [
        (True, None, {"task": 1.0}),
        (np.float32(0.5), None, {"task": 0.5}),
        (1.0, {}, {"task": 1.0}),
        (1.0, {"f1": "high"}, {"task": 1.0}),
        (1.0, {"f1": 0.75}, {"f1": 0.75, "other": 0.25}),
        (0.1 + 0.2, {"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.2}),
    ],
)
def test_the_environments_own_parts_always_add_up_to_its_reward(reward: Any, parts: Any, own: dict[str, float]) -> None:
    total, info = play(RewardedEnv(Riddle(reward, parts), []))
    assert info["rewards"] == own and total == sum(own.values())


def test_a_judge_is_a_reward_too() -> None:
    judge = {"function": "judge", "timeout_s": 5, "retries": 0, "options": {"url": "http://127.0.0.1:9", "model": "m"}}
    reward, info = play(RewardedEnv(Riddle(), [judge]))
    assert reward == 0.5 and "reward judge: http://127.0.0.1:9/chat/completions could not" in info["reward_error"]
    assert reward_pool.shared().report()["judge"].failures == 1


def test_a_spec_travels_as_json() -> None:
    given = {"function": "mine.py:worth", "weight": -2, "options": {"a": [1]}, "retries": 3}
    parsed = RewardSpec.parse(given)
    assert (parsed.name, parsed.weight, parsed.timeout_s, parsed.retries) == ("worth", -2, 10.0, 3)
    assert RewardSpec.parse(json.loads(json.dumps(parsed.plain()))) == parsed == RewardSpec.parse(parsed)
    assert RewardSpec.parse({"function": "mine:worth"}).name == "worth"
    assert RewardSpec.parse({"function": "json.decoder:JSONDecoder.decode"}).name == "decode"
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "a reward: it is 7"),
        ({}, "key 'function' of a reward: it is None"),
        ({"function": 7}, "key 'function' of a reward: it is 7"),
        ({"function": "contains", "wieght": 1}, "write 'weight'"),
        ({"function": "contains", "colour": 1}, "use function, name, weight"),
        ({"function": "contains", "weight": "1"}, "it is '1'. Do this: give a number"),
        ({"function": "contains", "weight": True}, "it is True. Do this: give a number"),
        ({"function": "contains", "weight": math.nan}, "give a finite number"),
        ({"function": "contains", "weight": 10**400}, "give a finite number"),
        ({"function": "contains", "timeout_s": 0}, "give seconds above 0, to 3600"),
        ({"function": "contains", "timeout_s": math.nan}, "give seconds above 0"),
        ({"function": "contains", "retries": -1}, "give 0 to 10"),
        ({"function": "contains", "retries": 1.5}, "give a whole number"),
        ({"function": "contains", "processes": 0}, "give 1 to 64"),
        ({"function": "contains", "name": " "}, "give a name"),
        ({"function": "contains", "options": []}, "give a table"),
        ({"function": "contains", "options": {"whole_words": math.inf}}, "JSON cannot hold them"),
        ({"function": "contains", "options": {"whole_word": True}}, "write 'whole_words'"),
        ({"function": "repetitions", "weight": 1}, "write 'repetition', or write \"module:function\""),
        ({"function": "xyzzy"}, 'write "module:function"'),
        ({"function": "repetition"}, "give its weight, a negative one for a penalty"),
        ({"function": "classifier"}, "give its weight, a negative one for a penalty"),
        ({"function": "repetition", "weight": -1, "options": {"n": "2"}}, "with these options it raised TypeError"),
        ({"function": "word_list", "weight": -1, "options": {"file": "none.txt"}}, "it raised FileNotFoundError"),
        ({"function": "judge", "options": {"url": "http://h"}}, "reward 'judge': option 'model'"),
        ({"function": "missing.py:f"}, "there is no file missing.py"),
        ({"function": "mine.py:"}, "no name of a function"),
        ({"function": "mine.py:f()"}, "no name of a function"),
        ({"function": "nowhere:f"}, "name its file: nowhere.py:f"),
        ({"function": "json.nowhere:f"}, "no module 'json.nowhere'"),
        ({"function": "mine.nowhere:f"}, "no module 'mine.nowhere'"),
        ({"function": "a b:f"}, "no module 'a b'"),
        ({"function": ":f"}, "no module ''"),
    ],
)
def test_a_bad_spec_says_what_why_and_what_to_do(given: Any, message: str) -> None:
    with pytest.raises(DataError) as refused:
        RewardSpec.parse(given)
    assert message in str(refused.value)


def test_what_only_loading_shows_is_refused_when_the_environment_is_made(home: Path) -> None:
    (home / "broken.py").write_text("import nothing_of_this_name\n")
    for given, message in (
        (spec("missing"), "has no attribute 'missing'"),
        ({"function": "broken:f"}, "raised ModuleNotFoundError: No module named 'nothing_of_this_name' (broken.py:1)"),
        ({"function": "format", "options": {"pattern": "("}}, "with these options it raised"),
    ):
        with pytest.raises(DataError) as refused:
            RewardedEnv(Riddle(), [given])
        assert message in str(refused.value)


def test_two_rewards_of_one_name_and_a_weight_that_is_none_are_refused() -> None:
    with pytest.raises(DataError, match="two are called 'worth'"):
        RewardedEnv(Riddle(), [spec("worth"), spec("worth")])
    with pytest.raises(DataError, match="own_weight"):
        RewardedEnv(Riddle(), [], own_weight=math.nan)


def test_every_built_in_can_be_named() -> None:
    assert set(SHAPING) | set(REMOTE) == {
        *("length", "word_list", "repetition", "format", "contains", "compression"),
        *("judge", "reward_model", "classifier"),
    }
