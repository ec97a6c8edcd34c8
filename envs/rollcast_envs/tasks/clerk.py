"""The clerk's side of a dialogue: what an answer says, found by rule, and how a good clerk would say it.

Owns the rules of understanding that `rollcast/Dialogue-v0` documents, and the wording of its demonstrations. Does not
know goals or rewards. Every rule takes time in proportion to the length of the answer.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rollcast_envs.data.dialogue import CONSTRAINTS, Place
from rollcast_envs.tasks.multi_turn import one_of

ASKING = {
    "area": re.compile(r"\b(?:areas?|parts?|sides?|locations?|located|where)\b"),
    "price": re.compile(r"\b(?:prices?|priced|budget|cheap|expensive|moderate|spend)\b"),
    "food": re.compile(r"\b(?:foods?|cuisines?)\b"),
    "stars": re.compile(r"\b(?:stars?|ratings?)\b"),
    "type": re.compile(r"\b(?:types?|kinds?|sorts?|guesthouses?)\b"),
}
"""The words that ask for a slot."""
NAMES_OF_SLOTS = {"phone": "phone number", "address": "address", "postcode": "postcode", "fee": "entrance fee"}

ASK = {
    "area": ("Which part of town would you like?", "What area would you prefer?"),
    "price": ("What price range would you like?", "What is your price range?"),
    "food": ("What kind of food would you like?", "Which cuisine would you prefer?"),
    "stars": ("How many stars should it have?", "What star rating would you like?"),
    "type": ("What type of place would you like?", "What kind of place are you looking for?"),
}
OFFER = ("How about {name}? It is {kind} in the {area}.", "I suggest {name}, {kind} in the {area}.")
SENTENCE = re.compile(r"(?<=[.!?\n])")


@dataclass(frozen=True)
class Understood:
    """What an answer does. `understand` -> the customer."""

    named: tuple[Place, ...]
    """The listed places that it names, in the order of the list."""
    asked: tuple[str, ...]
    """The slots that it asks for, in the domain's order."""


def understand(answer: str, domain: str, table: Sequence[Place]) -> Understood:
    """The places that `answer` names and the slots that it asks for."""
    named = names_in(answer, table)
    questions = [part for part in SENTENCE.split(answer) if part.endswith("?") and not names_in(part, table)]
    text = " ".join(questions).casefold()
    return Understood(named, tuple(slot for slot in CONSTRAINTS[domain] if ASKING[slot].search(text)))


def names_in(text: str, table: Sequence[Place]) -> tuple[Place, ...]:
    """The places of `table` that `text` names; a name within a longer one ("Nandos City Centre") does not count."""
    padded = f" {words(text)} "
    found = set()
    for place in sorted(table, key=lambda place: -len(place.name)):
        name = f" {words(place.name).removeprefix('the ')} "
        if name in padded:
            found.add(place.id)
            padded = padded.replace(name, " | ")
    return tuple(place for place in table if place.id in found)


def heard_values(answer: str, place: Place, table: Sequence[Place], slots: Iterable[str]) -> set[str]:
    """Which of `slots` the answer gives: the place's value occurs, and no other value of the table does."""
    given = set()
    for slot in slots:
        text, value = comparable(slot, answer), comparable(slot, place.slots[slot])
        others = {comparable(slot, row.slots[slot]) for row in table if slot in row.slots} - {value}
        longer = [other for other in others if value in other]
        rest = text.replace(value, " | ")
        if value in text and not any(other in text for other in longer) and not any(other in rest for other in others):
            given.add(slot)
    return given


def comparable(slot: str, text: str) -> str:
    """The form in which a value is looked for: numbers and postcodes run together, the others as whole words."""
    plain = words(re.sub(r"£\s?([\d.]+)", r"\1 pounds", text)).replace("pounds", "pound")
    return plain.replace(" ", "") if slot in ("phone", "postcode") else f" {plain} "


def words(text: str) -> str:
    """Lower case, letters and digits only, one space between words.

    >>> words("Christ's College,  B&B!")
    'christs college b and b'
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("&", " and ")
    return " ".join(re.sub(r"[^\w]|_", " ", re.sub(r"['’]", "", plain)).split())


def ask(domain: str, slot: str, draw: np.random.Generator) -> str:
    """A question for the slot."""
    if (domain, slot) == ("hotel", "type"):
        return "Would you prefer a hotel or a guesthouse?"
    return one_of(ASK[slot], draw)


def offer(place: Place, draw: np.random.Generator) -> str:
    """An offer that says why the place fits."""
    slots = place.slots
    stars = f"{slots['stars']} star " if "stars" in slots else ""
    kind = " ".join((slots.get("price", ""), stars + slots.get("type", f"{slots.get('food')} restaurant"))).strip()
    article = "an" if kind[0] in "aeiou" else "a"
    return one_of(OFFER, draw).format(name=place.name, kind=f"{article} {kind}", area=slots["area"])


def inform(place: Place, slots: Sequence[str], draw: np.random.Generator) -> str:
    """The values of `slots` in one sentence."""
    parts = [f"the {NAMES_OF_SLOTS[slot]} is {place.slots[slot]}" for slot in slots]
    text = f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]
    return one_of((f"{text[0].upper()}{text[1:]}.", f"Sure, {text}."), draw)
