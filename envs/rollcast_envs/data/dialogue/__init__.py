"""Places in Cambridge and what customers say about them, from MultiWOZ by way of ConvLab-3 (Apache-2.0; see SOURCE.md).

Owns the two records, which slots a domain has, and their loading. Does not know goals, episodes or rewards.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

CONSTRAINTS = {
    "restaurant": ("food", "area", "price"),
    "hotel": ("type", "area", "price", "stars"),
    "attraction": ("type", "area"),
}
"""By domain, the slots that a customer may care about, in the order in which a clerk would ask for them."""

REQUESTS = {
    "restaurant": ("phone", "address", "postcode"),
    "hotel": ("phone", "address", "postcode"),
    "attraction": ("phone", "address", "postcode", "fee"),
}
"""By domain, the slots that a customer may ask about."""

ROLES = ("open", "tell", "request", "bye")
"""What a template is for: the first turn, saying what is wanted, asking about a place, leaving."""

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Place:
    """A row of the database. `build.py` makes them, the dialogue task fills goals and tables with them."""

    id: str
    """Domain and the database's own key, such as `hotel:5`."""
    domain: str
    name: str
    slots: dict[str, str]
    """Every slot of `CONSTRAINTS` and `REQUESTS` whose value is known, as it is shown."""
    source: str


@dataclass(frozen=True)
class Template:
    """Something that a customer said, with `{slot}` where a value stood. `build.py` -> the scripted customer."""

    id: str
    group: str
    """What splits are made by."""
    role: str
    """One of `ROLES`."""
    domain: str
    """A key of `CONSTRAINTS`; "" where it fits all."""
    slots: tuple[str, ...]
    """What it tells (`open`, `tell`) or asks for (`request`), in the domain's order."""
    text: str
    source: str


@cache
def load_places() -> tuple[Place, ...]:
    """All places, in the order of the file; read once a process."""
    return _load("places.jsonl", lambda record: Place(**record))


@cache
def load_templates() -> tuple[Template, ...]:
    """All templates, in the order of the file; read once a process."""
    return _load("templates.jsonl", lambda record: Template(**{**record, "slots": tuple(record["slots"])}))


def _load(name: str, make: Callable[[dict[str, Any]], Loaded]) -> tuple[Loaded, ...]:
    lines = (files(__name__) / name).read_text(encoding="utf-8").splitlines()
    return tuple(make(json.loads(line)) for line in lines)
