"""A table of countries to look things up in, from GeoNames (CC BY 4.0; see SOURCE.md).

Owns the record, its loading, and by what names a country is found. Does not know questions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

FIELDS = ("population", "area", "capital", "continent", "currency")


@dataclass(frozen=True)
class Country:
    """A row of the table. `build.py` makes them, the tool `lookup` reads them."""

    id: str
    """`country:` and the ISO code."""
    group: str
    """What splits are made by; the same as that of the country's geography facts."""
    name: str
    subject: str
    """The name as it stands in the middle of a sentence: "the Netherlands"."""
    aliases: tuple[str, ...]
    """Other names by which it is found."""
    capitals: tuple[str, ...]
    """Accepted names of the capital, the preferred one first; empty where there is none."""
    continent: str
    currency: str
    """Empty where there is none."""
    population: int
    area: int
    """Square kilometres."""
    source: str


@cache
def load_countries() -> tuple[Country, ...]:
    """All countries, in the order of the file; read once a process."""
    lines = (files(__name__) / "countries.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(_country(json.loads(line)) for line in lines)


@cache
def countries_by_name() -> Mapping[str, Country]:
    """Every country under each of its names, as `found_by` spells them."""
    named = {found_by(name): country for country in load_countries() for name in country.aliases}
    return named | {found_by(country.name): country for country in load_countries()}


def found_by(name: str) -> str:
    """The form in which names are compared.

    >>> found_by(" The  Netherlands")
    'netherlands'
    """
    return " ".join(name.casefold().replace("-", " ").split()).removeprefix("the ")


def _country(record: dict[str, Any]) -> Country:
    return Country(**{**record, "aliases": tuple(record["aliases"]), "capitals": tuple(record["capitals"])})
