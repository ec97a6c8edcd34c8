"""The built-in questions of `rollcast/ToolQA-v0`: made by a script from a table of countries.

Owns: which questions there are, their wording, what answers them and how right an answer is. Does not know how an
episode goes (`tool_qa.py`), nor where the facts come from (`rollcast_envs.data.tools`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from rollcast_envs.data.tools import FIELDS, Country, countries_by_name, found_by, load_countries
from rollcast_envs.rewards import exact_match, token_f1
from rollcast_envs.splits import in_split, position
from rollcast_envs.tasks.grading import last_number, near
from rollcast_envs.tasks.multi_turn import some
from rollcast_envs.tools import calculate

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

WORD = re.compile(r"\w+")


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
    def look_ups(self) -> list[tuple[str, str]]:
        """Name and field of each of these facts."""
        return [(country.name, field) for country, field in self.needed]

    @property
    def fields(self) -> dict[str, Any]:
        """What reward functions get."""
        return {"countries": [country.name for country in self.countries], "expression": self.expression}

    @property
    def phrasings(self) -> list[str]:
        """The question in all its wordings, that of evaluation first."""
        a, b = self.countries[0].subject, self.countries[-1].subject
        return [phrasing.format(a=a, b=b) for phrasing in PHRASINGS[self.kind]]

    def look_up(self, name: str, field: str) -> tuple[str, bool]:
        """What the tool says, and whether the question needs that fact."""
        country = countries_by_name().get(found_by(name))
        if country is None:
            return f"error: there is no country {name!r}", False
        if field not in FIELDS:
            return f"error: there is no field {field!r}; there are {', '.join(FIELDS)}", False
        return f"{field} of {country.name}: {fact(country, field)}", (country, field) in self.needed

    def calculates(self, result: float) -> bool:
        """Whether `result` is what the question has to be calculated."""
        return bool(self.expression) and close(result, float(calculate(self.expression)), self.kind)

    def graded(self, answer: str) -> float:
        """How right a final answer is, in [0, 1]."""
        if self.kind == "capital":
            return exact_match(answer, self.references) or token_f1(answer, self.references)
        number = last_number(answer)
        right = number is not None and close(number, float(calculate(self.expression)), self.kind)
        if self.kind != "difference":
            return float(right)
        return 0.5 * right + 0.5 * (first_named(answer, self.countries) == self.larger)

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


def close(number: float, wanted: float, kind: str) -> bool:
    """True if the number is `wanted` but for rounding, also to the last place that the question asks for."""
    return near(number, wanted, 0.05 if kind == "density" else 0.5)


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
