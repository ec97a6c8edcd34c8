"""`rollcast/Code-v0`: problems, the reward, how code is found in an answer, users' own data, and how it was built."""

import ast
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rollcast_envs.data.code.build import asserted, is_guessable, is_shown
from rollcast_envs.data.code.harvest import Check, checks_of, functions
from rollcast_envs.errors import DataError
from rollcast_envs.sandbox import SandboxError
from rollcast_envs.splits import SPLITS, Split
from rollcast_envs.tasks.code import CodeEnv, calls_of, code_in, passed, same

PROBLEMS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (files("rollcast_envs.data.code") / "problems.jsonl").read_text(encoding="utf-8").splitlines()
]
RECORD = {
    "id": "double",
    "entry_point": "double",
    "prompt": "Doubles a number.",
    "tests": [{"args": "2", "expected": "4"}, {"args": "x=3", "expected": "6"}, {"args": "'ab'", "expected": "'abab'"}],
}


def written(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("split", SPLITS)
def test_gymnasiums_checker_passes(split: Split) -> None:
    check_env(gymnasium.make("rollcast/Code-v0", split=split).unwrapped)


def test_a_right_answer_earns_all() -> None:
    env = gymnasium.make("rollcast/Code-v0")
    question, info = env.reset(seed=5)
    assert info["fields"]["entry_point"] in question and info["fields"]["prompt"] in question
    observation, reward, terminated, truncated, after = env.step(f"```python\n{info['references'][0]}```")
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    assert after["rewards"] == {"tests": 1.0} and after["metrics"] == {"tests": 1.0, "solved": 1.0}


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("def double(x): return 2 * x", 1),
        ("double = lambda x: x + x", 1),
        ("def double(x): return int(2 * x)", 2 / 3),
        ("def double(x): return 4", 1 / 3),
        ("def double(x): return 4.0 * x / 2", 2 / 3),
        ("def double(x): return str(2 * x)", 1 / 3),
        ("def double(y): return 2 * y", 2 / 3),
        ("def double(x): pass", 0),
        ("def triple(x): return 2 * x", 0),
        ("def double(x): return 2 * x\nraise SystemExit", 0),
        ("I do not know.", 0),
        ("", 0),
    ],
)
def test_the_reward_is_the_share_of_the_tests(tmp_path: Path, code: str, share: float) -> None:
    env = CodeEnv(data={"train": written(tmp_path, RECORD)})
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(code)
    assert terminated and reward == pytest.approx(share)
    assert info["metrics"] == {"tests": reward, "solved": float(share == 1)}


@pytest.mark.parametrize("split", SPLITS)
def test_references_of_a_sample_of_each_split_pass(split: Split) -> None:
    env = CodeEnv(split=split)
    for index in range(0, env.size or 0, 6):
        _, info = env.reset(options={"index": index})
        assert env.step(info["references"][0])[1] == 1.0, info["task_id"]


def test_no_constant_passes_and_neither_does_the_example() -> None:
    """Of each problem to train on: what always returns the shown value, or one that comes to mind, is not solved."""
    for problem in PROBLEMS:
        name, split = problem["entry_point"], problem["split"]
        if split != "test":
            shown = problem["prompt"].rsplit(">>> ", 1)[1].splitlines()[1]
            for constant in (shown, "None", "True", "False", "0", "[]"):
                tests = [test for test in problem["tests"] if not same(ast.literal_eval(constant), literal(test))]
                assert tests, (problem["id"], constant)
            assert f"def {name}(" in problem["prompt"]


def literal(test: dict[str, str]) -> Any:
    return ast.literal_eval(test["expected"])


def test_what_is_shown_is_not_scored() -> None:
    for problem in PROBLEMS:
        for test in problem["tests"]:
            assert f">>> {problem['entry_point']}({test['args']})\n" not in problem["prompt"], problem["id"]


def test_the_counts_are_those_of_the_notes() -> None:
    notes = (files("rollcast_envs.data.code") / "SOURCE.md").read_text(encoding="utf-8")
    by_split = Counter(problem["split"] for problem in PROBLEMS)
    assert [CodeEnv(split=split).size for split in SPLITS] == [by_split[split] for split in SPLITS]
    row = f"| all | {by_split['train']} | {by_split['validation']} | {by_split['test']} |"
    assert row in notes
    for kind, count in Counter(problem["kind"] for problem in PROBLEMS).items():
        assert kind in notes and count


def test_humaneval_is_for_test_only_and_no_function_is_in_two_splits() -> None:
    assert {problem["kind"] for problem in PROBLEMS if problem["split"] == "test"} == {"humaneval"}
    assert all(problem["split"] == "test" for problem in PROBLEMS if problem["kind"] == "humaneval")
    splits_of: dict[str, set[str]] = {}
    for problem in PROBLEMS:
        splits_of.setdefault(problem["entry_point"].lower().replace("_", ""), set()).add(problem["split"])
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert len({problem["id"] for problem in PROBLEMS}) == len(PROBLEMS)


def test_expected_values_cannot_be_found_by_the_code(tmp_path: Path) -> None:
    """It looks through all that Python reaches, and would return what it finds."""
    expected = "aardvark-7719"
    search = """
import gc, sys
def look():
    for thing in gc.get_objects():
        for text in (thing if isinstance(thing, (list, tuple)) else thing.values() if isinstance(thing, dict) else ()):
            if isinstance(text, str) and text.startswith("aardvark-"):
                return text
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, str) and value.startswith("aardvark-") and len(value) > 9:
                return value
        frame = frame.f_back
"""
    record = {**RECORD, "entry_point": "look", "tests": [{"args": "", "expected": repr(expected)}]}
    assert passed(record, search) == [False]
    assert passed(record, f"def look(): return {expected!r}") == [True]


def test_an_endless_loop_costs_its_answer_and_the_next_is_served(tmp_path: Path) -> None:
    env = CodeEnv(data={"train": written(tmp_path, RECORD)}, timeout_s=0.5)
    for answer, reward in (("def double(x):\n    while x: pass", 0.0), ("def double(x): return 2 * x", 1.0)):
        env.reset(seed=0)
        assert env.step(answer)[1] == reward


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("Sure:\n\n```py\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
        ("```\ndef f(): pass", "def f(): pass"),
        ("Here: ```python\ndef f(): pass\n``` that is all", "def f(): pass\n"),
        ("1. So:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass\n"),
        ("```bash\npip install x\n```\n```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```python\nf = min\n```\n```python\nprint(f(1))\n```", "f = min\n"),
        ("```\nnothing here\n```\n```\nnor here\n```", "nothing here\n"),
        ("def f(): pass", "def f(): pass"),
        ("The function is:\n\nimport math\n\ndef f(): pass", "import math\n\ndef f(): pass"),
        ("LIMIT = 3\ndef f(): return LIMIT", "LIMIT = 3\ndef f(): return LIMIT"),
        ("LIMIT: dict[str, int] = {}\ndef f(): pass", "LIMIT: dict[str, int] = {}\ndef f(): pass"),
        ("Use this.\n@cache\ndef f(): pass", "@cache\ndef f(): pass"),
        ("From the example, f is a sum.\nasync def f(): pass", "async def f(): pass"),
        ("no code at all", "no code at all"),
        ("", ""),
    ],
)
def test_code_is_found_in_an_answer(answer: str, code: str) -> None:
    assert code_in(answer, "f") == code


def test_a_long_answer_is_searched_quickly() -> None:
    for part in ("```", "```\n", "``` \n```", "x = ", "@", "a: b, ", "def f(", "\n", " "):
        assert isinstance(code_in(part * (300_000 // len(part)), "f"), str)


@pytest.mark.parametrize(
    ("found", "right", "equal"),
    [
        (1, 1, True),
        (1, 1.0, True),
        (1.0, 1, True),
        (True, 1, False),
        (1, True, False),
        (None, False, False),
        (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False),
        (10**400, 1.0, False),
        (10**30 + 1, 10**30, False),
        (float("inf"), float("inf"), True),
        (float("inf"), 1e300, False),
        (float("nan"), 1.0, False),
        (1 + 1e-12j, 1, True),
        ("1", 1, False),
        ("a", "a", True),
        (b"a", "a", False),
        ([1, 2], [1, 2], True),
        ([1, 2], (1, 2), False),
        ([1], [1, 2], False),
        ([[0.1 + 0.2], ("x",)], [[0.3], ("x",)], True),
        ([[0.1 + 0.2], ["x"]], [[0.3], ("x",)], False),
        ({1: 0.1 + 0.2, "b": []}, {"b": [], 1: 0.3}, True),
        ({1: 2}, {True: 2}, False),
        ({1: 2, 3: 4}, {1: 2}, False),
        ({1, 2}, {2, 1}, True),
        ({1, 2}, {1, 3}, False),
        ({True}, {1}, False),
        (set(), {}, False),
        (frozenset({1}), {1}, False),
        ("9" * 10, 9999999999, False),
    ],
)
def test_when_a_result_is_right(found: Any, right: Any, equal: bool) -> None:
    assert same(found, right) is equal


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ([], "at least one test"),
        ("assert f(1) == 2", "a list"),
        ([{"args": "1"}], '"args" and "expected"'),
        ([{"args": "1", "expected": "2", "weight": "3"}], '"args" and "expected"'),
        ([{"args": 1, "expected": 2}], "in quotes"),
        ([["1", "2"]], '"args" and "expected"'),
        ([{"args": "x", "expected": "2"}], "literals"),
        ([{"args": "1", "expected": "f(1)"}], "literals"),
        ([{"args": "1) or (2", "expected": "2"}], "literals"),
        ([{"args": "**{'a': 1}", "expected": "2"}], "literals"),
        ([{"args": "*[1, 2]", "expected": "2"}], "literals"),
        ([{"args": "1", "expected": "2", "through": "eval"}], "one of list"),
        ([{"args": "a=1, a=2", "expected": "2"}], "literals"),
    ],
)
def test_bad_tests_are_told_at_the_start(tmp_path: Path, tests: Any, why: str) -> None:
    path = written(tmp_path, {**RECORD, "tests": tests})
    with pytest.raises(DataError, match=why) as error:
        CodeEnv(data={"train": path})
    assert "record 'double'" in str(error.value) and "Do this: write each test as" in str(error.value)


def test_columns_are_mapped_and_optional_ones_may_lack(tmp_path: Path) -> None:
    row = {"text": "Adds one.", "name": "inc", "checks": [{"args": "1", "expected": "2"}], "setup": "ONE = 1"}
    fields = {"prompt": "text", "entry_point": "name", "tests": "checks", "preamble": "setup"}
    env = CodeEnv(data={"train": written(tmp_path, row)}, fields=fields)
    question, info = env.reset(seed=0)
    assert "Adds one." in question and "inc" in question and info["references"] == []
    assert env.step("def inc(x): return x + ONE")[1] == 1.0


def test_arguments_may_be_several_named_and_of_any_literal(tmp_path: Path) -> None:
    record = {**RECORD, "tests": [{"args": "{1: (2,)}, {3}, k=-1e999,\n", "expected": "0"}]}
    (call,) = calls_of(record)
    positional, named = ast.literal_eval(call.arguments)
    assert positional == [{1: (2,)}, {3}] and named == {"k": float("-inf")}


def test_few_shot_examples_show_a_question_and_its_solution() -> None:
    env = CodeEnv(split="validation", few_shot=2)
    train = {problem["solution"] for problem in PROBLEMS if problem["split"] == "train"}
    assert len(env.few_shot) == 2 and all(answer in train for _, answer in env.few_shot)


def test_a_machine_without_a_sandbox_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="riscv64"):
        CodeEnv()


SOURCE = '''
import itertools
from .elsewhere import thing
LIMIT = 2

def pairs(items, n=LIMIT):
    """Splits a list.

    Examples
    --------
    >>> data = [1, 2, 3]
    >>> pairs(data)
    [[1, 2], [3]]
    >>> list(pairs(range(4)))
    [[0, 1], [2, 3]]
    >>> pairs([1], n=1) == [[1]]
    True
    >>> pairs(object())
    []
    >>> print(pairs([]))
    []

    See Also
    --------
    other
    """
    return [list(items[start:start + n]) for start in range(0, len(items), helper(n))]

def helper(n: thing) -> thing:
    "Stays."
    return n

def needs(x):
    """Stands not alone.

    >>> needs(1)
    1
    >>> needs(2)
    2
    """
    return thing(x)
'''


def test_functions_that_stand_alone_are_harvested_with_their_checks() -> None:
    (found,) = functions(SOURCE)
    assert found.name == "pairs" and found.preamble == "LIMIT = 2\ndef helper(n):\n    return n"
    assert found.checks == (
        Check("[1, 2, 3]", "[[1, 2], [3]]"),
        Check("[0, 1, 2, 3]", "[[0, 1], [2, 3]]", "list"),
        Check("[1], n=1", "[[1]]"),
    )
    assert found.prompt(found.checks[1]) == (
        'def pairs(items, n=LIMIT):\n    """\n    Splits a list.\n\n'
        '    >>> list(pairs([0, 1, 2, 3]))\n    [[0, 1], [2, 3]]\n    """\n'
    )


def test_examples_that_are_no_checks_are_left_out() -> None:
    assert list(checks_of(">>> f(x)\n1\n>>> f(1)\n<object>\n>>> g(1)\n1\n>>> f(*[1])\n1\n>>> f(1, **{})\n1", "f")) == []
    assert list(checks_of(">>> f(1)\n1\n>>> f(1)\n1", "f")) == [Check("1", "1")]


def test_assertions_are_read_as_checks() -> None:
    test = """
def check(candidate):
    assert candidate(3 * 19) == [3, 19], "message"
    assert 2 == candidate('a' + 'b')
    assert candidate(1)
    assert not candidate(2)
    assert abs(candidate(1.5) - 1.0 / 2) < 1e-6
    assert tuple(candidate([1])) == tuple([1])
    assert candidate(other()) == 1
    assert True
"""
    assert list(asserted(test)) == [
        Check("57", "[3, 19]"),
        Check("'ab'", "2"),
        Check("1", "True"),
        Check("2", "False"),
        Check("1.5", "0.5"),
        Check("[1]", "(1,)", "tuple"),
    ]


def test_a_check_that_the_prompt_shows_is_known_in_any_form() -> None:
    prompt = 'def f(x):\n    """ f([1,2, 3]) -> 6; for "abcdef" it is 0; f(5) == 3 """'
    assert is_shown(Check("[1, 2, 3]", "6"), "f", prompt) and is_shown(Check("'abcdef'", "0"), "f", prompt)
    assert is_shown(Check("5", "3"), "f", prompt) and not is_shown(Check("3", "1"), "f", prompt)


def test_what_a_constant_passes_is_guessable() -> None:
    def tests(*expected: str) -> list[dict[str, str]]:
        return [{"args": "", "expected": value} for value in expected]

    shown = {"args": "", "expected": "7"}
    assert is_guessable(shown, tests("7", "7")) and is_guessable(shown, tests("False"))
    assert not is_guessable(shown, tests("8")) and not is_guessable(shown, tests("True", "False"))
