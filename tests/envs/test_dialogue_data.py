"""The data behind `rollcast/Dialogue-v0`: goals, templates and places, their splits, and how they are built."""

import hashlib
import re
from collections import Counter
from importlib.resources import files

import pytest

from rollcast_envs.data.building import likeness, to_lines
from rollcast_envs.data.dialogue import CONSTRAINTS, REQUESTS, ROLES, load_places, load_templates
from rollcast_envs.data.dialogue.build import SDIST_SHA256, build_places, build_templates, roles, tidy
from rollcast_envs.splits import SPLITS, split_of
from rollcast_envs.tasks.dialogue import (
    MATCHES,
    fill,
    goals_of,
    templates_of,
)


def test_no_goal_and_no_template_is_in_two_splits() -> None:
    goals = [{(goal.domain, *goal.constraints.items()) for goal in goals_of(split)} for split in SPLITS]
    texts = [{text for cell in templates_of(split).values() for text in cell} for split in SPLITS]
    for seen in (goals, texts):
        assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_goals_are_of_two_or_three_constraints_that_few_places_fulfil() -> None:
    for split in SPLITS:
        for goal in goals_of(split):
            assert len(goal.constraints) in (2, 3) and 1 <= len(goal.matches) <= MATCHES
            assert 1 <= len(goal.requested) <= 3 and set(goal.requested) <= set(REQUESTS[goal.domain])
            assert all(slot in row.slots for row in goal.matches for slot in goal.requested)


def test_every_split_has_words_for_every_slot() -> None:
    for split in SPLITS:
        cells = templates_of(split)
        for domain, slots in CONSTRAINTS.items():
            for slot in slots:
                assert cells.get(("tell", domain, (slot,))) or cells.get(("open", domain, (slot,))), (
                    split,
                    domain,
                    slot,
                )
        assert all(cells[("request", "", (slot,))] for slot in REQUESTS["attraction"]) and cells[("bye", "", ())]


def test_no_template_is_nearly_one_of_another_split() -> None:
    cells = {key for split in SPLITS for key in templates_of(split)}
    for key in cells:
        train, validation, test = (list(templates_of(split).get(key, ())) for split in SPLITS)
        assert (likeness(train, validation + test) < 0.6).all() and (likeness(validation, test) < 0.6).all()


def test_articles_go_with_the_value() -> None:
    text = "I want an {price} {type}. A {food} place, a {area} one."
    values = {"price": "cheap", "type": "hotel", "food": "italian", "area": "east"}
    assert fill(text, values) == "I want a cheap hotel. An italian place, an east one."
    assert fill("An {food} place", {"food": "european"}) == "A european place"


def test_templates_hold_their_slots_and_no_value() -> None:
    templates = load_templates()
    assert len({template.id for template in templates}) == len(templates) > 2000
    foods = {row.slots["food"] for row in load_places() if "food" in row.slots} - {"international"}
    for template in templates:
        assert template.role in ROLES
        held = sorted(re.findall(r"\{(\w+)\}", template.text))
        assert held == (sorted(template.slots) if template.role in ("open", "tell") else [])
        assert not re.search(
            rf"\b(?:{'|'.join(foods)}|north|south|cheap|expensive)\b|\d| ,| \.", template.text.casefold()
        )


def test_places_have_every_slot_and_the_files_stay_small() -> None:
    places = load_places()
    assert Counter(row.domain for row in places) == {"restaurant": 107, "attraction": 78, "hotel": 33}
    for row in places:
        assert {*CONSTRAINTS[row.domain], *REQUESTS[row.domain]} - {"fee"} <= row.slots.keys()
        assert re.fullmatch(r"\d{5} \d{6}", row.slots["phone"]) and re.fullmatch(
            r"\w{2,5} \w{3}", row.slots["postcode"]
        )
    folder = files("rollcast_envs.data.dialogue")
    assert sum(len((folder / f"{name}.jsonl").read_bytes()) for name in ("places", "templates")) < 1_200_000


def test_the_provenance_file_tells_the_digests_and_counts_of_what_is_shipped() -> None:
    folder = files("rollcast_envs.data.dialogue")
    told = (folder / "SOURCE.md").read_text(encoding="utf-8")
    for name in ("places", "templates"):
        assert hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest() in told
    assert SDIST_SHA256 in told and "multiwoz" in (folder / "NOTICE").read_text(encoding="utf-8")
    for role in ROLES:
        splits = Counter(split_of(template.group) for template in load_templates() if template.role == role)
        row = " | ".join(f"{number:,}" for number in (splits.total(), *(splits[split] for split in SPLITS)))
        assert f" | {row} |" in told, role
    goals = [len(goals_of(split)) for split in SPLITS]
    assert f"{sum(goals):,} ({' / '.join(f'{number:,}' for number in goals)})" in told
    groups = [len({goal.group for goal in goals_of(split)}) for split in SPLITS]
    assert f"{sum(groups)} sets of constraints ({' / '.join(map(str, groups))})" in told


@pytest.mark.parametrize(
    ("domain", "deed", "slots", "text", "role"),
    [
        ("restaurant", "inform", ("area",), "I am looking for a restaurant in the {area}.", "open"),
        ("restaurant", "inform", ("area",), "In the {area}, please.", "tell"),
        ("restaurant", "inform", ("area",), "No, in the {area} instead.", None),
        ("restaurant", "inform", ("area",), "I need a chinese restaurant in the {area}.", None),
        ("restaurant", "inform", ("area",), "I need a restaurant in the {area} and a hotel to stay.", None),
        ("restaurant", "inform", ("area", "price"), "I need a restaurant in the {area}.", None),
        ("hotel", "inform", ("price",), "I need a hotel that is {price}.", None),
        ("attraction", "inform", ("type",), "Can you find some {type} to visit?", None),
        ("hotel", "request", ("phone",), "Can I get the phone number?", "request"),
        ("hotel", "request", ("phone",), "Can I get the phone number and the address?", None),
        ("hotel", "request", ("phone",), "Can I get the phone number of Acorn House?", None),
        ("general", "bye", (), "Thank you, goodbye.", "bye"),
        ("general", "bye", (), "See you at the hotel, goodbye.", None),
        ("taxi", "inform", ("area",), "I need a taxi in the {area}.", None),
    ],
)
def test_utterances_are_sorted_by_what_they_can_be_used_for(
    domain: str, deed: str, slots: tuple[str, ...], text: str, role: str | None
) -> None:
    assert list(roles(domain, deed, slots, text)) == ([role] if role else [])


def test_the_tokenisers_spaces_are_taken_back() -> None:
    assert tidy("I 'd like a   #HOTEL-INFORM-TYPE# , it does n't matter .") == "I'd like a {type}, it doesn't matter."


def test_the_same_source_gives_the_same_bytes_in_any_order() -> None:
    lines = [
        f"I need a restaurant in the #RESTAURANT-INFORM-AREA# {word} ." for word in ("please", "of town", "side")
    ] * 12
    lines += ["I need a chinese restaurant ."]
    one = build_templates({"Restaurant-Inform": {"Area;": lines}})
    other = build_templates({"Restaurant-Inform": {"Area;": lines[::-1]}})
    assert to_lines(one) == to_lines(other)
    row = {
        "id": "7",
        "name": "the castle",
        "area": "east",
        "food": "thai",
        "pricerange": "cheap",
        "address": "1 mill road",
        "phone": "01223000000",
        "postcode": "cb17ab",
    }
    rows = [row, {**row, "id": "8", "phone": "?"}, {**row, "id": "9", "name": "the place"}]
    (built,) = build_places({"restaurant": rows})
    assert (
        built["name"] == "The Castle"
        and built["slots"]["price"] == "cheap"
        and built["slots"]["phone"] == "01223 000000"
    )
    assert built["slots"]["postcode"] == "CB1 7AB" and built["slots"]["address"] == "1 Mill Road"
