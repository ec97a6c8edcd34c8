"""`rollcast/ToolQA-v0`: questions on countries that need a look-up and a calculator, called in the model's own format.

Owns the questions, the tools and the rewards. Does not know how a call is written or arithmetic done
(`rollcast_envs.tools` does), nor where the facts come from (`rollcast_envs.data.tools` does).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from rollcast_envs.data.tools import FIELDS, Country, countries_by_name, found_by, load_countries
from rollcast_envs.rewards import exact_match, token_f1
from rollcast_envs.splits import in_split, portion_named, position
from rollcast_envs.tasks.multi_turn import MultiTurnTask, few_shot_examples, one_of, some
from rollcast_envs.tools import CalculationError, Call, Parsed, calculate, parse_calls

KINDS = ("density", "difference", "sum", "capital")
PHRASINGS = {
    "density": (
        "How many people per square kilometre live in {a}? Round to one decimal.",
        "What is the population density of {a} in people per square kilometre, to one decimal?",
    ),
    "difference": (
        "Which has more people, {a} or {b}, and by how many? Name the country, then the number.",
        "Does {a} or {b} have more people, and how many more? Name the country, then the number.",
    ),
    "sum": (
        "What is the population of {a} plus that of {b}?",
        "How many people live in {a} and {b} together?",
    ),
    "capital": (
        "What is the capital of the country with more people, {a} or {b}?",
        "Of {a} and {b}, take the one with more people. What is its capital?",
    ),
}
PER_KIND = 1000
"""Questions of a kind in a split, at most."""
LARGEST_RATIO, SMALLEST_RATIO = 20, 1.05
"""Of two populations: close enough that both count in a sum, far enough apart that rounding does not decide."""
SMALLEST_DENSITY = 1.0
TOLERANCE = 0.005
"""A number is right within this part of it, or within half a unit of the last place asked for."""
CALL_REWARD, MALFORMED = 0.1, -0.1

LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks up a fact about a country.",
        "parameters": {
            "type": "object",
            "properties": {
                "country": {"type": "string", "description": "Name of the country"},
                "field": {"type": "string", "enum": list(FIELDS), "description": "What to look up; area is in km2"},
            },
            "required": ["country", "field"],
        },
    },
}
CALCULATE = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "Such as 12 * (3 + 4)"}},
            "required": ["expression"],
        },
    },
}
PARAMETERS = {"lookup": ("country", "field"), "calculate": ("expression",)}

PROMPT = "Answer the question with the tools. When you know the answer, write only the answer."
TOOL_PROMPT = """You have two tools:
- lookup(country, field): looks up a fact about a country.
  The field is population, area (in km2), capital, continent or currency.
- calculate(expression): calculates an arithmetic expression, such as 12 * (3 + 4).

To call a tool, write only its call, in this form:
<tool_call>
{"name": "lookup", "arguments": {"country": "Atlantis", "field": "population"}}
</tool_call>
You are then told the result, such as: population of Atlantis: 1200"""

NUMBER = re.compile(
    r"(?<![\w.])([-−]?)(\d{1,3}(?:[,\u00a0\u202f ]\d{3})+(?!\d)|\d+)(\.\d+)?(?:\s*(thousand|million|billion)\b)?",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")
MULTIPLES = {"": 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9}
READ = 4000
"""Characters at the end of a final answer in which its number is looked for."""


@dataclass(frozen=True)
class Question:
    """One question, made from the table."""

    kind: str
    countries: tuple[Country, ...]

    @property
    def id(self) -> str:
        return f"{self.kind}:" + "+".join(country.id.removeprefix("country:") for country in self.countries)

    @property
    def larger(self) -> Country:
        return max(self.countries, key=lambda country: country.population)

    @property
    def needed(self) -> tuple[tuple[Country, str], ...]:
        """The facts that answer it, in the order in which to look them up."""
        if self.kind == "density":
            return (self.countries[0], "population"), (self.countries[0], "area")
        facts = tuple((country, "population") for country in self.countries)
        return (*facts, (self.larger, "capital")) if self.kind == "capital" else facts

    @property
    def expression(self) -> str:
        """What to calculate; "" if nothing."""
        first, second = self.countries[0], self.countries[-1]
        return {
            "density": f"round({first.population} / {first.area}, 1)",
            "difference": f"abs({first.population} - {second.population})",
            "sum": f"{first.population} + {second.population}",
            "capital": "",
        }[self.kind]

    @property
    def references(self) -> list[str]:
        if self.kind == "capital":
            return list(self.larger.capitals)
        number = calculate(self.expression)
        return [f"{self.larger.name}, {number}"] if self.kind == "difference" else [number]


@dataclass
class Progress:
    """How far an episode has come."""

    turns: int = 0
    calls: int = 0
    malformed: int = 0
    """Answers in which something that was meant as a call was none."""
    looked_up: bool = False
    calculated: bool = False


class ToolQAEnv(MultiTurnTask):
    """Questions that need facts and arithmetic; the model calls `lookup` and `calculate`, then answers.

    An answer with a call is not the final one: what the tools return is the next observation, with `role` "tool" in
    `info`. An answer without a call is final, and terminates the episode. After `max_turns` answers without a final one
    the episode is truncated. The facts are GeoNames'; the questions are made from them by a script, from 1,000 of each
    kind in the train split down to as many as the split's countries give. Countries are split 80 / 10 / 10, as in QA.

    Reward, in parts:
        - `calls`: 0.1 for the first look-up of a fact that the question needs, 0.1 for the first calculation that gives
          the number asked for.
        - `malformed`: -0.1 for each answer with a call that is broken, unknown, or lacks an argument.
        - `answer`: how right the final answer is, in [0, 1]. A number: 1 if the last number in the answer is within
          0.5 %. A name: token F1. "Which and by how many": half for the country named first, half for the number.

    Args:
        split: "train", "validation" or "test".
        kinds: which of density, difference, sum and capital to ask; None for all.
        max_turns: answers until the episode is cut short.
        tool_prompt: whether the system prompt describes the tools and shows a call, for models whose chat template
            does not tell them of `tools`.
        system_prompt: what the system turn says before that; None for nothing.
        few_shot: how many demonstrated episodes of the train split open every episode as examples, or the examples
            themselves as [[question, answer], ...]. In demonstrated ones, tools answer in the user's turns.
    """

    tools = (LOOKUP, CALCULATE)
    folds = True

    def __init__(
        self,
        split: str = "train",
        kinds: Sequence[str] | None = None,
        max_turns: int = 6,
        tool_prompt: bool = True,
        system_prompt: str | None = PROMPT,
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        super().__init__()
        if max_turns < 1:
            raise ValueError(f"max_turns is {max_turns}; expected 1 or more")
        self.kinds = _valid_kinds(kinds)
        self.questions = questions_of(split, self.kinds)
        self.size = len(self.questions)
        self.max_turns = max_turns
        self.system_prompt = "\n\n".join(part for part in (system_prompt, TOOL_PROMPT * tool_prompt) if part) or None
        self.few_shot = few_shot_examples(few_shot, lambda: ToolQAEnv(portion_named(split).training, kinds))
        self.question = self.questions[0]
        self.progress = Progress()

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        self.progress = Progress()
        phrasing = 0
        if index is None:
            kind = one_of(self.kinds, self.np_random)
            self.question = one_of([question for question in self.questions if question.kind == kind], self.np_random)
            phrasing = int(self.np_random.integers(len(PHRASINGS[self.question.kind])))
        else:
            self.question = self.questions[index]
        a, b = self.question.countries[0].subject, self.question.countries[-1].subject
        return PHRASINGS[self.question.kind][phrasing].format(a=a, b=b), self._info()

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.progress.turns += 1
        parsed = parse_calls(answer)
        if not parsed.calls and not parsed.problems:
            return self._final(answer)
        rewards = {"calls": 0.0, "malformed": 0.0}
        results = self._run(parsed, rewards)
        truncated = self.progress.turns >= self.max_turns
        info = self._info() | {"rewards": rewards, "role": "tool"}
        if truncated:
            info["metrics"] = self._metrics(0.0)
        return "\n".join(results), sum(rewards.values()), False, truncated, info

    def demonstration(self) -> list[str]:
        """One look-up or calculation a turn, then the answer."""
        question = self.question
        calls = [written("lookup", country=country.name, field=field) for country, field in question.needed]
        if question.expression:
            calls.append(written("calculate", expression=question.expression))
        return [*calls, question.references[0]]

    def _final(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        score = graded(self.question, answer)
        info = self._info() | {"rewards": {"answer": score}, "metrics": self._metrics(score)}
        return "", score, True, False, info

    def _run(self, parsed: Parsed, rewards: dict[str, float]) -> list[str]:
        """What the tools say to each call, and what is wrong with what is none."""
        results = []
        problems = [f"error: this call is malformed: {problem}" for problem in parsed.problems]
        for call in parsed.calls:
            problem = _misused(call)
            if problem:
                problems.append(f"error: {problem}")
            else:
                self.progress.calls += 1
                results.append(
                    self._look_up(call, rewards) if call.name == "lookup" else self._calculate(call, rewards)
                )
        if problems:
            self.progress.malformed += 1
            rewards["malformed"] = MALFORMED
        return [*results, *problems]

    def _look_up(self, call: Call, rewards: dict[str, float]) -> str:
        name, field = str(call.arguments["country"])[:100], str(call.arguments["field"]).strip().lower()[:100]
        country = countries_by_name().get(found_by(name))
        if country is None:
            return f"error: there is no country {name!r}"
        if field not in FIELDS:
            return f"error: there is no field {field!r}; there are {', '.join(FIELDS)}"
        if (country, field) in self.question.needed and not self.progress.looked_up:
            self.progress.looked_up = True
            rewards["calls"] += CALL_REWARD
        return f"{field} of {country.name}: {fact(country, field)}"

    def _calculate(self, call: Call, rewards: dict[str, float]) -> str:
        expression = str(call.arguments["expression"])
        try:
            result = calculate(expression)
        except CalculationError as error:
            return f"error: {error}"
        wanted = self.question.expression
        if (
            wanted
            and not self.progress.calculated
            and close(float(result), float(calculate(wanted)), self.question.kind)
        ):
            self.progress.calculated = True
            rewards["calls"] += CALL_REWARD
        return result

    def _info(self) -> dict[str, Any]:
        question = self.question
        names = [country.name for country in question.countries]
        return {
            "task_id": question.id,
            "kind": question.kind,
            "references": question.references,
            "fields": {"countries": names, "expression": question.expression},
        }

    def _metrics(self, score: float) -> dict[str, float]:
        progress = self.progress
        return {
            "correct": float(score == 1.0),
            "calls": float(progress.calls),
            "malformed": float(progress.malformed),
            "turns": float(progress.turns),
        }


def graded(question: Question, answer: str) -> float:
    """How right a final answer is, in [0, 1]."""
    if question.kind == "capital":
        return exact_match(answer, question.references) or token_f1(answer, question.references)
    number = last_number(answer)
    right = number is not None and close(number, float(calculate(question.expression)), question.kind)
    if question.kind != "difference":
        return float(right)
    return 0.5 * right + 0.5 * (first_named(answer, question.countries) == question.larger)


def last_number(text: str) -> float | None:
    """The last number of a text; "1,234", "1 234" and "1.2 million" are understood.

    >>> last_number("It has 1,200 people, which is 3.5 per km2."), last_number("about 12.5 million")
    (3.5, 12500000.0)
    """
    found = None
    for found in NUMBER.finditer(text[-READ:]):  # noqa: B007  (the last one is meant)
        pass
    if found is None:
        return None
    sign, whole, decimals, multiple = found.groups(default="")
    return float(re.sub(r"\D", "", whole) + decimals) * MULTIPLES[multiple.lower()] * (-1 if sign else 1)


def close(number: float, wanted: float, kind: str) -> bool:
    """True if the number is `wanted` but for rounding."""
    return abs(number - wanted) <= max(TOLERANCE * abs(wanted), 0.05 if kind == "density" else 0.5) * (1 + 1e-9)


def first_named(text: str, countries: Sequence[Country]) -> Country | None:
    """The country that is named first in the text."""

    def spaced(words: str) -> str:
        return f" {' '.join(re.findall(WORD, words.casefold()))} "

    plain = spaced(text)

    def place(country: Country) -> int:
        found = (plain.find(spaced(name)) for name in (country.name, *country.aliases))
        return min((at for at in found if at >= 0), default=len(plain))

    first = min(countries, key=place)
    return first if place(first) < len(plain) else None


def fact(country: Country, field: str) -> str:
    """What `lookup` says."""
    if field == "capital":
        return country.capitals[0] if country.capitals else "none"
    if field == "area":
        return f"{country.area} km2"
    return str(getattr(country, field)) or "none"


def written(name: str, **arguments: str) -> str:
    """A call as the tool prompt shows it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


@cache
def questions_of(split: str, kinds: tuple[str, ...] = KINDS) -> tuple[Question, ...]:
    """The questions of a split or of a part of train, shuffled for good, so that every prefix mixes the kinds."""
    countries = [country for country in load_countries() if in_split(country.group, split)]
    of_kinds = (some(questions_on(kind, countries), f"questions of {kind}", split) for kind in kinds)
    questions = [question for found in of_kinds for question in found]
    return tuple(sorted(questions, key=lambda question: position(question.id)))


def questions_on(kind: str, countries: Sequence[Country]) -> list[Question]:
    """The fair questions of a kind, at most `PER_KIND`; kinds take different pairs as long as there are enough."""
    if kind == "density":
        fair = (country for country in countries if country.population / country.area >= SMALLEST_DENSITY)
        return [Question(kind, (country,)) for country in fair]
    pairs = fair_pairs(tuple(countries))
    start = PER_KIND * KINDS.index(kind) % max(len(pairs), 1)
    turned = [*pairs[start:], *pairs[:start]]
    known = [pair for pair in turned if kind != "capital" or all(country.capitals for country in pair)]
    return [Question(kind, pair) for pair in known[:PER_KIND]]


@cache
def fair_pairs(countries: tuple[Country, ...]) -> list[tuple[Country, Country]]:
    """Pairs whose populations compare well, shuffled; which of two comes first is by hash as well."""
    found = []
    for one, other in combinations(countries, 2):
        small, large = sorted((one.population, other.population))
        if SMALLEST_RATIO <= large / small <= LARGEST_RATIO:
            place = position(f"{one.id}+{other.id}")
            found.append((place, (other, one) if place % 2 else (one, other)))
    return [pair for _, pair in sorted(found, key=lambda ranked: ranked[0])]


def _misused(call: Call) -> str:
    """What is wrong with the tool or the arguments of a call; "" if nothing."""
    if call.name not in PARAMETERS:
        return f"there is no tool {call.name[:100]!r}; there are {', '.join(PARAMETERS)}"
    wanted = PARAMETERS[call.name]
    if set(call.arguments) != set(wanted):
        return f"{call.name} takes {' and '.join(wanted)}"
    if not all(isinstance(value, str | int | float) for value in call.arguments.values()):
        return f"the arguments of {call.name} are strings"
    return ""


def _valid_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    if kinds is None:
        return KINDS
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds is {kinds!r}; expected a list with some of {', '.join(KINDS)}, or None for all")
    return tuple(kinds)
