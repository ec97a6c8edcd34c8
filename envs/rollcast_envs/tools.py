"""Calling tools in plain text: finding the calls in an answer, and a calculator that is safe to hand to a model.

Owns the formats of calls and the arithmetic. Does not know which tools a task has. Answers and expressions are hostile
input: both take bounded time, whatever is in them.

Formats understood, anywhere in an answer and several at once; special tokens around them may have been stripped:
    - Hermes, Qwen, SmolLM2: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`
    - Llama 3: `<|python_tag|>{"name": ..., "parameters": {...}}`, also with `"type": "function"`
    - Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}`
    - OpenAI: `{"type": "function", "function": {"name": ..., "arguments": "{...}"}}`
    - the same objects in a fenced block, or bare.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 16
"""Calls, and places that look like one, that are read of an answer."""

CALL_STARTS = re.compile(r'\{\s*"(?:name|arguments|parameters|type|id|function)"\s*:')
NAMED_ARGUMENTS = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]{1,64})\s*(?:\[CALL_ID\][^\[{]{0,64})?\[ARGS\]\s*(?=\{)")
MARKERS = re.compile(r"</?tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>|\[ARGS\]")
NAME_ALONE = re.compile(r'\{\s*"name"\s*:\s*"')
JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """One tool and its arguments. `parse_calls` -> a task."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Parsed:
    """What was found in an answer, in its order."""

    calls: tuple[Call, ...]
    problems: tuple[str, ...]
    """What is wrong with each thing that was meant as a call, told to the model."""


def parse_calls(answer: str) -> Parsed:
    """The calls in `answer`; neither calls nor problems if it is an ordinary answer."""
    calls: list[Call] = []
    problems: list[str] = []
    for found in _attempts(answer):
        if isinstance(found, Call):
            calls.append(found)
        else:
            problems.append(found)
    if not calls and not problems and MARKERS.search(answer):
        problems.append('there is no call in it; write {"name": ..., "arguments": {...}}')
    return Parsed(tuple(calls), tuple(problems))


def _attempts(answer: str) -> Iterator[Call | str]:
    """Each call in turn, or what is wrong with it."""
    at = 0
    for _ in range(MAX_CALLS):
        start, name = _next_start(answer, at)
        if start is None:
            return
        try:
            value, at = JSON.raw_decode(answer, start)
        except (ValueError, RecursionError):
            at = start + 1
            if name or NAME_ALONE.match(answer, start):
                yield "its JSON is broken"
            continue
        found = _call({"name": name, "arguments": value} if name else value)
        if found is None:
            at = start + 1
        else:
            yield found


def _next_start(answer: str, at: int) -> tuple[int | None, str]:
    """Where the next JSON object begins that may be a call, and its name if that stands before it."""
    bare, named = CALL_STARTS.search(answer, at), NAMED_ARGUMENTS.search(answer, at)
    if named and (bare is None or named.end() <= bare.start()):
        return named.end(), named[1]
    return (bare.start(), "") if bare else (None, "")


def _call(value: Any) -> Call | str | None:
    """The call that an object is, or what is wrong with it; None if it is something else."""
    if "name" not in value or not value.keys() & {"arguments", "parameters"}:
        return None
    name, arguments = value["name"], value.get("arguments", value.get("parameters"))
    if not isinstance(name, str):
        return "its name is not a string"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return "its arguments are a string that is not JSON"
    if not isinstance(arguments, dict):
        return "its arguments are not an object"
    return Call(name, arguments)


class CalculationError(ValueError):
    """An expression that is not calculated, and why, told to the model."""


MAX_EXPRESSION = 200
"""Characters of an expression."""
MAX_DEPTH = 20
MAX_BITS = 1024
"""Of a whole number; floats are bounded by themselves."""
MAX_DIGITS = 20
"""That `round` may be asked to keep or to drop."""

TOKEN = re.compile(r"\s+|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+|\*\*|//|[-+*/%(),]|(?:round|min|max|abs)\b")
Number = int | float
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, floats to 12 digits. Raises `CalculationError`.

    >>> calculate("round(7 / 2, 1) + 2**10"), calculate("0.1 + 0.2")
    ('1027.5', '0.3')
    """
    value = _value(_parsed(expression), MAX_DEPTH)
    return str(value) if isinstance(value, int) else format(value, ".12g")


def _parsed(expression: str) -> ast.expr:
    if len(expression) > MAX_EXPRESSION:
        raise CalculationError(f"the expression is longer than {MAX_EXPRESSION} characters")
    at = 0
    while at < len(expression):
        token = TOKEN.match(expression, at)
        if token is None:
            raise CalculationError(
                f"{expression[at]!r} is not understood; use numbers, + - * / // % ** ( ), round, min, max, abs"
            )
        at = token.end()
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise CalculationError("the expression is not complete arithmetic; write numbers without commas") from None


def _value(node: ast.expr, depth: int) -> Number:
    """The value of a node. Each operation's size is checked before it is done."""
    if depth == 0:
        raise CalculationError(f"the expression is nested more than {MAX_DEPTH} deep")
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth - 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right):
            return _combined(op, _value(left, depth - 1), _value(right, depth - 1))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _applied(name, [_value(argument, depth - 1) for argument in arguments])
        case ast.Tuple():
            raise CalculationError("write numbers without commas")
        case _:
            raise CalculationError("only arithmetic is calculated")


def _combined(op: ast.operator, left: Number, right: Number) -> Number:
    try:
        return _bounded(_power(left, right) if isinstance(op, ast.Pow) else BINARY[type(op)](left, right))
    except ZeroDivisionError:
        raise CalculationError("division by zero") from None
    except OverflowError:
        raise CalculationError("the numbers are too large") from None


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int):
        if (base.bit_length() - 1) * exponent > MAX_BITS:  # at least so many bits, and at most twice as many
            raise CalculationError("the power is too large")
    elif base < 0:
        raise CalculationError("a negative number has no fractional power")
    return _bounded(base**exponent)


def _applied(name: str, values: list[Number]) -> Number:
    if name in ("min", "max") and len(values) > 1:
        return min(values) if name == "min" else max(values)
    if name == "abs" and len(values) == 1:
        return abs(values[0])
    if name == "round" and len(values) == 1:
        return round(values[0])
    if name == "round" and len(values) == 2 and isinstance(values[1], int) and abs(values[1]) <= MAX_DIGITS:
        return _bounded(round(values[0], values[1]))
    raise CalculationError(f"{name} got {len(values)} values that it cannot take")


def _bounded(value: Any) -> Number:
    """`value`, if it is a number of a size that can be shown."""
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise CalculationError("the numbers are too large")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise CalculationError("the numbers are too large")
    result: Number = value
    return result
