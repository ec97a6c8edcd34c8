"""Calls in every format that models use, broken and hostile ones among them, and the calculator."""

import json
import math
from time import monotonic

import pytest

from rollcast_envs.tools import MAX_CALLS, CalculationError, Call, calculate, parse_calls

PARIS = Call("lookup", {"country": "France", "field": "capital"})
ARGUMENTS = '{"country": "France", "field": "capital"}'


@pytest.mark.parametrize(
    "answer",
    [
        f'<tool_call>\n{{"name": "lookup", "arguments": {ARGUMENTS}}}\n</tool_call>',
        f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "lookup"}}',
        f'[{{"name": "lookup", "arguments": {ARGUMENTS}}}]',
        f'<tool_call>[{{"name": "lookup", "arguments": {ARGUMENTS}}}]</tool_call>',
        f'<|python_tag|>{{"name": "lookup", "parameters": {ARGUMENTS}}}',
        f'{{"type": "function", "name": "lookup", "parameters": {ARGUMENTS}}}<|eom_id|>',
        f'[TOOL_CALLS] [{{"name": "lookup", "arguments": {ARGUMENTS}, "id": "VvvODy9mT"}}]</s>',
        f"[TOOL_CALLS]lookup[ARGS]{ARGUMENTS}",
        f"[TOOL_CALLS]lookup[CALL_ID]VvvODy9mT[ARGS]{ARGUMENTS}",
        f'I look it up.\n```json\n{{"name": "lookup", "arguments": {ARGUMENTS}}}\n```\nOne moment.',
        json.dumps({"id": "1", "type": "function", "function": {"name": "lookup", "arguments": ARGUMENTS}}),
        json.dumps({"name": "lookup", "arguments": ARGUMENTS}),
    ],
)
def test_every_format_is_understood(answer: str) -> None:
    parsed = parse_calls(answer)
    assert parsed.calls == (PARIS,) and parsed.problems == ()


def test_several_calls_come_in_their_order() -> None:
    one, other = (json.dumps({"name": "lookup", "arguments": {"country": name}}) for name in ("Chad", "Mali"))
    for answer in (
        f"{one}; {other}",
        f"[{one}, {other}]",
        f"<tool_call>{one}</tool_call>\n<tool_call>{other}</tool_call>",
    ):
        assert [call.arguments["country"] for call in parse_calls(answer).calls] == ["Chad", "Mali"]
    mixed = parse_calls('[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{"x": 2}')
    assert mixed.calls == (Call("a", {"x": 1}), Call("b", {"x": 2}))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Paris",
        "The answer is {42}.",
        '{"name": "France", "capital": "Paris"}',
        "```json\n[1, 2]\n```",
        "東京 🙂",
        "{{{{",
    ],
)
def test_an_ordinary_answer_holds_no_call(answer: str) -> None:
    parsed = parse_calls(answer)
    assert parsed.calls == () and parsed.problems == ()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('<tool_call>{"name": "lookup", "arguments": {"country": </tool_call>', "JSON is broken"),
        ('{"name": "lookup", "arguments": {"country": "France"', "JSON is broken"),
        ("<tool_call>lookup France</tool_call>", "no call in it"),
        ("<tool_call></tool_call>", "no call in it"),
        ("[TOOL_CALLS]", "no call in it"),
        ('[TOOL_CALLS]lookup[ARGS]{"country": }', "JSON is broken"),
        ('{"name": 7, "arguments": {}}', "name is not a string"),
        ('{"name": "lookup", "arguments": ["France"]}', "not an object"),
        ('{"name": "lookup", "arguments": "France"}', "string that is not JSON"),
        ('{"name": "lookup", "arguments": null}', "not an object"),
        ('{"name": "a", "arguments": {"n": %s}}' % ("9" * 5000), "JSON is broken"),
    ],
)
def test_a_broken_call_is_told_as_a_problem(answer: str, problem: str) -> None:
    parsed = parse_calls(answer)
    assert parsed.calls == ()
    assert len(parsed.problems) == 1 and problem in parsed.problems[0]


def test_a_good_call_beside_a_broken_one_still_counts() -> None:
    parsed = parse_calls(f'{{"name": "x", "arguments": 3}} {{"name": "lookup", "arguments": {ARGUMENTS}}}')
    assert parsed.calls == (PARIS,) and len(parsed.problems) == 1


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "[",
        '{"name":',
        '{"name": {"arguments":',
        '{"name": "',
        "<tool_call>",
        "[TOOL_CALLS]",
        "{ ",
        "\\",
        '{"id": [',
    ],
)
def test_a_megabyte_of_anything_is_read_in_bounded_time(piece: str) -> None:
    answer = (piece * (1_000_000 // len(piece) + 1))[:1_000_000]
    began = monotonic()
    parsed = parse_calls(answer)
    assert monotonic() - began < 5
    assert parsed.calls == () and len(parsed.problems) <= MAX_CALLS


def test_no_more_calls_are_read_than_allowed() -> None:
    assert len(parse_calls('{"name": "a", "arguments": {}}' * 1000).calls) == MAX_CALLS


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("7 // 2 - 7 % 4", "0"),
        ("-2 ** 2", "-4"),
        ("+3 - -3", "6"),
        ("2 ** 0.5", "1.41421356237"),
        ("2 ** -1", "0.5"),
        ("0.1 + 0.2", "0.3"),
        ("round(66987244 / 547030, 1)", "122.5"),
        ("round(1234, -2)", "1200"),
        ("round(2.6)", "3"),
        ("min(3, 1, 2) + max(1, 2.5)", "3.5"),
        ("abs(3 - 10)", "7"),
        (" 1e3 * .5 ", "500"),
        ("10 / 4", "2.5"),
        ("2 ** 1000", str(2**1000)),
        ("1 ** 10**18", "1"),
        ("(" * 99 + "1" + ")" * 99, "1"),
    ],
)
def test_arithmetic(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "not complete"),
        ("1 +", "not complete"),
        ("12,000 + 1", "without commas"),
        ("(1, 2)", "without commas"),
        ("1 / 0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9**9**9", "too large"),
        ("9**9**9**9**9", "too large"),
        ("(2**1000) ** (2**1000)", "too large"),
        ("2**1000 * 2**1000", "too large"),
        ("9.9 ** 999999", "too large"),
        ("1e999", "too large"),
        ("10**300 / 1e-300", "too large"),
        ("1e308 * 10", "too large"),
        ("(0 - 8) ** 0.5", "fractional power"),
        ("round(5, 0 - 10**9)", "cannot take"),
        ("round(5, 1.5)", "cannot take"),
        ("abs(1, 2)", "cannot take"),
        ("min(1)", "cannot take"),
        ("round()", "cannot take"),
        ("(" * 201 + "1", "longer than 200"),
        ("-" * 100 + "1", "nested more"),
        ("1+" * 60 + "1", "nested more"),
        ("__import__('os')", "not understood"),
        ("round.__class__", "not understood"),
        ("x + 1", "not understood"),
        ("1 if 1 else 2", "not understood"),
        ("[1]*9", "not understood"),
        ("'a' * 9", "not understood"),
        ("1 = 1", "not understood"),
        ("1_000", "not understood"),
        ("round", "only arithmetic"),
        ("round(*round)", "only arithmetic"),
        ("round(1)(2)", "only arithmetic"),
        ("1\n+2", "not complete"),
        ("007", "not complete"),
        ("1\x00", "not understood"),
        ("٣ + 1", "not complete"),
        ("2 × 3", "not understood"),
        ("\ud800", "not understood"),
    ],
)
def test_what_is_no_arithmetic_is_refused_and_says_why(expression: str, why: str) -> None:
    with pytest.raises(CalculationError, match=why) as caught:
        calculate(expression)
    str(caught.value).encode()


def test_every_value_is_a_finite_number_of_a_size_that_can_be_shown() -> None:
    for expression in ("2**1023", "0 - 2**1023", "1e308", "1e-320", "10**300 % 7"):
        value = calculate(expression)
        assert len(value) < 400 and math.isfinite(float(value))
