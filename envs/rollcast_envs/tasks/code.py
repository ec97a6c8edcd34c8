"""`rollcast/Code-v0`: write a Python function; the reward is the share of hidden tests that it passes.

Owns: how code is found in an answer, what a test is, and when a result is right. Does not run anything itself: the
sandbox does (`rollcast_envs.sandbox`), and no expected value ever goes there.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from textwrap import dedent
from typing import Any, ClassVar

import numpy as np

from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Record
from rollcast_envs.sandbox import Call, Limits, run
from rollcast_envs.sandbox_child import THROUGH
from rollcast_envs.sandbox_filter import filter_program
from rollcast_envs.tasks.single_turn import SingleTurnTask, Verdict

SYSTEM_PROMPT = "Answer with Python code only: the whole function, with the imports that it needs."
REL_TOL, ABS_TOL = 1e-6, 1e-9
"""How far a float may be from the expected one."""

FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
"""A block that is not closed goes to the end: such an answer ran out of tokens."""
CODE_BEGINS = re.compile(
    r"^(?:(?:async )?def \w+\(|class \w+ ?[(:]|import \w|from [\w.]+ import |@\w|\w+(?:: ?[\w\[\], .]+)? ?= ?\S|#)",
    re.MULTILINE,
)


class CodeEnv(SingleTurnTask):
    """Python functions to write, from a signature and a description.

    An episode is one question and one answer; it always terminates. The answer's code runs in a sandbox: a sealed
    process without files, network or other processes, under limits on time and memory. What it does there, be it
    an endless loop, costs it the tests that it does not pass and harms nobody.

    Built in: functions of free libraries for train and validation, HumanEval for test (a public benchmark: never train
    on it). The examples in the question are not among the tests.

    Reward: the share of the tests passed. A result is right if it is equal, of the same type (an int may stand for a
    float and the other way round; floats to one part in a million; a bool for nothing else; no list for a tuple).
    What is no literal, such as an object or an iterator, is wrong.

    Your own data: `prompt`, `entry_point` (the function's name), `tests` (a list of {"args": "[3, 1], reverse=True",
    "expected": "[3, 1]"}, both as Python literals; an optional "through": "list" passes the result through list, tuple,
    set, sorted or dict first); optionally `solution`, and `preamble`, code that runs before the answer.

    Args:
        split, data, fields, system_prompt, few_shot: as for every task on a data set.
        timeout_s: seconds of processor time that all tests of one answer may take together, rounded up to whole ones;
            four times that by the clock, for answers that sleep.
        memory_mb: address space of one answer; Python itself takes about 40.

    Raises:
        DataError: when a record's tests are not as above; it names the record.
        SandboxError: on a machine without the sandbox; nothing runs outside it.
    """

    built_in: ClassVar[Mapping[str, str]] = {"problems": "code/problems.jsonl"}
    wanted: ClassVar[tuple[Field, ...]] = (
        Field("prompt", "text", "what to write: a signature and a description"),
        Field("entry_point", "text", "the name of the function that the tests call"),
        Field("tests", "any", 'hidden tests: a list of {"args": "[3, 1], 2", "expected": "4"}, Python literals'),
        Field("solution", "text", "a right answer", required=False),
        Field("preamble", "text", "code that runs before the answer, such as imports", required=False),
    )

    def __init__(
        self,
        split: str = "train",
        data: str | Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        system_prompt: str | None = SYSTEM_PROMPT,
        few_shot: int | Sequence[Sequence[str]] = 0,
        timeout_s: float = 3.0,
        memory_mb: int = 256,
    ) -> None:
        filter_program()  # Refuses machines without a sandbox now, not at the first answer.
        self.limits = Limits(timeout_s, memory_mb)
        super().__init__(split, data, fields, system_prompt, few_shot)

    def open(self, split: str, data: str | Mapping[str, str] | None, fields: Mapping[str, str] | None) -> Any:
        records = super().open(split, data, fields)
        if isinstance(data, Mapping) or (data or next(iter(self.built_in))) not in self.built_in:
            for index in range(len(records)):
                calls_of(records[index])
        return records

    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        return f"Write the Python function `{record['entry_point']}`.\n\n{record['prompt']}"

    def references(self, record: Record) -> list[str]:
        return [record["solution"]] if record.get("solution") else []

    def judge(self, record: Record, answer: str) -> Verdict:
        results = passed(record, answer, self.limits)
        share = sum(results) / len(results)
        return Verdict({"tests": share}, {"tests": share, "solved": float(share == 1)})


def passed(record: Record, answer: str, limits: Limits | None = None) -> list[bool]:
    """For each test of the record whether the answer's code passes it. Raises `DataError`, `SandboxError`."""
    sources = [str(record.get("preamble") or ""), code_in(answer, record["entry_point"])]
    outcomes = run(sources, record["entry_point"], calls_of(record), limits)
    expected = [ast.literal_eval(test["expected"]) for test in record["tests"]]
    return [not found.error and same(found.value, right) for found, right in zip(outcomes, expected, strict=True)]


def code_in(answer: str, entry_point: str) -> str:
    """The code of an answer: its fenced block (of several the one that defines the function), else all of it.

    An unfenced answer may begin with prose: what stands before the first line of code is left out.

    >>> code_in("Sure! Here it is:\\n```python\\ndef f(x):\\n    return x\\n```\\nIt returns x.", "f")
    'def f(x):\\n    return x\\n'
    >>> code_in("Here it is:\\ndef f(x): return x", "f")
    'def f(x): return x'
    """
    blocks = [dedent(block) for block in FENCED.findall(answer)]
    if blocks:
        defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*=", re.MULTILINE)
        return next((block for block in blocks if defines.search(block)), blocks[0])
    begins = CODE_BEGINS.search(answer)
    return answer[begins.start() :] if begins else answer


def calls_of(record: Record) -> list[Call]:
    """The calls of a record's tests, checked. Raises `DataError`."""
    tests = record["tests"]
    if not isinstance(tests, list) or not tests:
        raise _bad_test(record, f"tests is {_short(tests)}", "a record needs a list of at least one test")
    return [_call(record, test) for test in tests]


def _call(record: Record, test: Any) -> Call:
    known = {"args", "expected", "through"}
    if not isinstance(test, dict) or not known >= test.keys() >= {"args", "expected"}:
        raise _bad_test(record, f"a test is {_short(test)}", 'it needs the keys "args" and "expected"')
    if not all(isinstance(value, str) for value in test.values()):
        raise _bad_test(record, f"a test is {_short(test)}", "its values are texts: Python literals, in quotes")
    through = test.get("through", "")
    if through and through not in THROUGH:
        raise _bad_test(record, f'"through" is {_short(through)}', f"it is one of {', '.join(THROUGH)}")
    try:
        ast.literal_eval(test["expected"])
        return Call(_arguments(test["args"]), through)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise _bad_test(record, f"a test is {_short(test)}", f"it is not made of Python literals ({error})") from error


def _arguments(args: str) -> str:
    """What stands between the parentheses of a call, as the literal that the sandbox takes."""
    call = ast.parse(f"f({args}\n)", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("not the arguments of one call")
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in named or len(named) < len(call.keywords):
        raise ValueError("** in a call, or a name twice")
    keys: list[ast.expr | None] = [ast.Constant(name) for name in named]
    both = ast.Tuple([ast.List(call.args, ast.Load()), ast.Dict(keys, list(named.values()))], ast.Load())
    text = ast.unparse(both)
    ast.literal_eval(text)
    return text


def _bad_test(record: Record, what: str, why: str) -> DataError:
    example = '{"args": "[3, 1], reverse=True", "expected": "[3, 1]"}'
    return DataError(f"record {record.get('id')!r}: {what}", why, f"write each test as {example}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def same(found: Any, right: Any) -> bool:
    """Whether a result equals what was expected, by type too; a number by value, floats within a tolerance."""
    if isinstance(right, bool) or right is None or isinstance(right, str | bytes):
        return type(found) is type(right) and bool(found == right)
    if isinstance(right, int | float | complex):
        return _close(found, right)
    if type(found) is not type(right):
        return False
    if isinstance(right, list | tuple):
        return len(found) == len(right) and all(map(same, found, right))
    if isinstance(right, dict):
        by_key = {repr(key): value for key, value in found.items()}
        return len(found) == len(right) and all(
            repr(key) in by_key and same(by_key[repr(key)], value) for key, value in right.items()
        )
    return sorted(map(repr, found)) == sorted(map(repr, right))


def _close(found: Any, right: complex) -> bool:
    if type(found) is int and type(right) is int:
        return found == right
    if type(found) not in (int, float, complex):
        return False
    try:
        distance, size = abs(complex(found) - complex(right)), max(abs(complex(found)), abs(complex(right)))
    except OverflowError:  # An int beyond all floats.
        return False
    return bool(found == right) or distance <= max(REL_TOL * size, ABS_TOL) < math.inf
