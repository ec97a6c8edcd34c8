"""Facts on countries and cities, from GeoNames (CC BY 4.0; see SOURCE.md).

Owns the record and its loading. Does not know how a fact is asked, split or scored.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

KINDS = ("capital", "continent", "currency", "country")


@dataclass(frozen=True)
class Fact:
    """One thing to know. `build.py` makes them, the QA task asks for them.

    Facts that give each other away have one `group`: all those about a country, among which is the country
    of its capital city. Splits are made by group.
    """

    id: str
    """Kind and GeoNames' own key, such as `capital:FR` or `country:1796236`."""
    kind: str
    """One of `KINDS`: what is asked for."""
    subject: str
    """What it is asked about, as it stands in the middle of a sentence: "France", "the Netherlands"."""
    references: tuple[str, ...]
    """Accepted answers, the preferred one first."""
    group: str
    source: str
    """The GeoNames record it comes from."""


@cache
def load_facts() -> tuple[Fact, ...]:
    """All facts, in the order of the file; read once a process."""
    lines = (files(__name__) / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(_fact(json.loads(line)) for line in lines)


def _fact(record: dict[str, str | list[str]]) -> Fact:
    return Fact(**{**record, "references": tuple(record["references"])})  # type: ignore[arg-type]
