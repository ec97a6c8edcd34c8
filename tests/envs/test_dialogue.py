"""`rollcast/Dialogue-v0`: the customer, the rules of understanding, rewards, splits, and the data behind them."""

import hashlib
import re
from collections import Counter
from importlib.resources import files
from random import Random
from time import monotonic
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rollcast_envs.data.building import likeness, to_lines
from rollcast_envs.data.dialogue import CONSTRAINTS, REQUESTS, ROLES, Place, load_places, load_templates
from rollcast_envs.data.dialogue.build import SDIST_SHA256, build_places, build_templates, roles, tidy
from rollcast_envs.splits import SPLITS, Split, split_of
from rollcast_envs.tasks.clerk import ask, heard_values, inform, names_in, offer, understand
from rollcast_envs.tasks.dialogue import (
    GIVE_UP,
    HEARD,
    MATCHES,
    NO_PREFERENCE,
    DialogueEnv,
    fill,
    goals_of,
    templates_of,
)
from rollcast_envs.tasks.multi_turn import exchanges


def make(**kwargs: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make("rollcast/Dialogue-v0", **kwargs)


def place(name: str, **slots: str) -> Place:
    return Place(id=f"restaurant:{name}", domain="restaurant", name=name, slots=slots, source="test")


NANDOS = place("Nandos", area="south", phone="01223 327908", address="Cherry Hinton Road", postcode="CB1 7DY")
CENTRE = place(
    "Nandos City Centre", area="centre", phone="01223 300000", address="5 Cherry Hinton Road", postcode="CB2 3AR"
)
COLLEGE = place("The Queens' College", area="west", phone="01223 335511", address="Silver Street", fee="2.50 pounds")
TABLE = (NANDOS, CENTRE, COLLEGE)


def opened(index: int = 0, **kwargs: Any) -> DialogueEnv:
    env = DialogueEnv(**kwargs)
    env.reset(options={"index": index})
    return env


def hidden(env: DialogueEnv) -> list[str]:
    return [slot for slot in env.episode.goal.constraints if slot not in env.episode.opening]


def first_with(env: DialogueEnv, wanted: str) -> None:
    """Opens the first task of a domain."""
    index = next(at for at, goal in enumerate(env.goals) if goal.domain == wanted)
    env.reset(options={"index": index})


@pytest.mark.parametrize("split", SPLITS)
def test_gymnasiums_checker_passes(split: Split) -> None:
    check_env(make(split=split).unwrapped)


@pytest.mark.parametrize("split", SPLITS)
def test_the_demonstration_solves_two_hundred_tasks_of_every_split(split: Split) -> None:
    env = DialogueEnv(split)
    for seed in range(200):
        env.reset(seed=seed)
        answers = env.demonstration()
        wanted = 0.2 * len(hidden(env)) + 0.4 + 0.2 * len(env.episode.goal.requested) - 0.02 * len(answers)
        returns, ends = 0.0, []
        for answer in answers:
            said, reward, terminated, truncated, info = env.step(answer)
            returns += reward
            ends.append((terminated, truncated))
            assert reward == pytest.approx(sum(info["rewards"].values())) and said
        assert ends == [(False, False)] * (len(answers) - 1) + [(True, False)]
        assert returns == pytest.approx(wanted)
        assert info["metrics"] == {
            "success": 1.0, "slots": 1.0, "offer": 1.0, "values": 1.0, "wrong_offers": 0.0, "turns": len(answers),
        }  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_random_answers_never_raise_and_never_succeed(split: Split) -> None:
    env = DialogueEnv(split)
    env.action_space.seed(1)
    for seed in range(200):
        env.reset(seed=seed)
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            done = terminated or truncated
        assert info["metrics"]["success"] == 0.0 and info["metrics"]["turns"] <= 10


def test_a_clerk_that_says_random_things_of_the_trade_never_raises() -> None:
    """Questions, names and values at random: everything the rules react to, in every order."""
    env = DialogueEnv()
    chance = Random(1)
    successes = 0.0
    for seed in range(200):
        env.reset(seed=seed)
        done = False
        while not done:
            row = chance.choice(env.episode.table)
            slot = chance.choice(CONSTRAINTS[row.domain])
            said = [f"What {slot}?", f"How about {row.name}?", str(chance.choice([*row.slots.values()]))]
            _, _, terminated, truncated, info = env.step(" ".join(chance.sample(said, chance.randint(0, 3))))
            done = terminated or truncated
        successes += info["metrics"]["success"]
    assert 0 < successes < 60


def test_equal_seeds_and_answers_give_equal_episodes() -> None:
    one, other = DialogueEnv(), DialogueEnv()
    firsts = [one.reset(seed=seed) for seed in range(30)]
    assert firsts == [other.reset(seed=seed) for seed in range(30)]
    assert len({said for said, _ in firsts}) == 30
    for answer in ("hm", *one.demonstration()):
        assert one.step(answer) == other.step(answer)


def test_the_next_task_does_not_depend_on_how_the_last_one_went() -> None:
    env = DialogueEnv()
    env.reset(seed=5)
    for answer in env.demonstration():
        env.step(answer)
    after_success = env.reset()[0]
    env.reset(seed=5)
    env.step("")
    assert env.reset()[0] == after_success


@pytest.mark.parametrize("split", SPLITS)
def test_every_index_opens_its_own_task_always_in_the_same_words(split: Split) -> None:
    env = DialogueEnv(split)
    visits = [env.reset(options={"index": index}) for index in range(env.size or 0)]
    assert len({info["task_id"] for _, info in visits}) == env.size == len(goals_of(split))
    assert visits[7] == DialogueEnv(split).reset(seed=9, options={"index": 7})
    assert {info["kind"] for _, info in visits} == set(CONSTRAINTS)


def test_the_first_turn_lists_places_among_which_are_all_that_fit() -> None:
    for candidates in (4, 8):
        env = DialogueEnv(candidates=candidates)
        for seed in range(60):
            said, info = env.reset(seed=seed)
            listed, _, spoken = said.partition("\n\nCustomer: ")
            lines = listed.splitlines()[1:]
            goal = env.episode.goal
            assert len(lines) == candidates and spoken
            fitting = {
                row.name for row in env.episode.table if all(row.slots[s] == v for s, v in goal.constraints.items())
            }
            assert fitting == set(info["references"]) == {row.name for row in goal.matches}
            assert all(any(line.startswith(f"- {row.name}: ") for line in lines) for row in env.episode.table)


def test_the_customer_opens_with_some_constraints_and_hides_at_least_one() -> None:
    env = DialogueEnv("validation")
    for index in range(env.size or 0):
        said, info = env.reset(options={"index": index})
        spoken = said.partition("Customer: ")[2].casefold()
        values = info["fields"]["constraints"]
        assert 0 < len(env.episode.opening) < len(values) <= 3
        assert all(re.search(rf"\b{values[slot]}\b", spoken) for slot in env.episode.opening)
        assert "{" not in spoken


def test_asking_finds_out_what_is_hidden_and_pays_once() -> None:
    env = opened()
    slot = hidden(env)[0]
    question = ask(env.episode.goal.domain, slot, np.random.default_rng(0))
    said, reward, _, _, info = env.step(question)
    assert env.episode.goal.constraints[slot] in said and reward == pytest.approx(0.18)
    assert info["rewards"] == {"slots": 0.2, "offer": 0.0, "wrong_offer": 0.0, "values": 0.0, "turn": -0.02}
    said, reward, _, _, _ = env.step(question)
    assert env.episode.goal.constraints[slot] in said and reward == pytest.approx(-0.02)


def test_the_customer_says_so_where_there_is_no_preference() -> None:
    env = DialogueEnv()
    for seed in range(50):
        env.reset(seed=seed)
        free = [slot for slot in CONSTRAINTS[env.episode.goal.domain] if slot not in env.episode.goal.constraints]
        if free:
            said, reward, _, _, _ = env.step(ask(env.episode.goal.domain, free[0], np.random.default_rng(0)))
            assert said in NO_PREFERENCE[free[0]] and reward == pytest.approx(-0.02)
            assert env.episode.idle == 0
            return
    raise AssertionError("every goal constrains every slot")


def test_a_wrong_offer_costs_and_is_put_right() -> None:
    env = opened()
    wrong = next(row for row in env.episode.table if row not in env.episode.goal.matches)
    said, reward, terminated, _, info = env.step(f"How about {wrong.name}?")
    assert info["rewards"]["wrong_offer"] == -0.1 and reward == pytest.approx(-0.12) and not terminated
    unfit = [slot for slot, value in env.episode.goal.constraints.items() if wrong.slots[slot] != value]
    assert any(env.episode.goal.constraints[slot] in said for slot in unfit)


def test_naming_every_place_is_a_wrong_offer() -> None:
    env = opened()
    answer = " or ".join(row.name for row in env.episode.table)
    assert env.step(answer)[4]["rewards"]["wrong_offer"] == -0.1 and env.episode.place is None


def test_a_right_offer_pays_once_and_is_followed_by_a_request() -> None:
    env = opened()
    right = env.episode.goal.matches[0]
    said, _, _, _, info = env.step(f"I can recommend {right.name.upper()}!")
    assert info["rewards"]["offer"] == 0.4
    words = {
        "phone": "phone|number",
        "address": "address",
        "postcode": "post ?code|postal|zip",
        "fee": "fee|cost|admission",
    }
    assert any(re.search(words[slot], said.casefold()) for slot in env.episode.goal.requested)
    assert env.step(f"It is {right.name}.")[4]["rewards"]["offer"] == 0.0


def test_values_given_with_the_offer_count_at_once() -> None:
    env = opened()
    right = env.episode.goal.matches[0]
    answer = (
        offer(right, np.random.default_rng(0))
        + " "
        + inform(right, env.episode.goal.requested, np.random.default_rng(0))
    )
    _, _, terminated, _, info = env.step(answer)
    assert terminated and info["metrics"]["success"] == 1.0
    assert info["rewards"]["values"] == pytest.approx(0.2 * len(env.episode.goal.requested))


def test_pouring_out_the_whole_list_gives_no_value() -> None:
    env = opened()
    right = env.episode.goal.matches[0]
    env.step(right.name)
    everything = " ".join(value for row in env.episode.table for value in row.slots.values())
    assert env.step(everything)[4]["rewards"]["values"] == 0.0


def test_the_customer_gives_up_after_idle_answers_in_a_row() -> None:
    env = opened(patience=2)
    assert env.step("hm")[2:4] == (False, False)
    said, _, terminated, truncated, info = env.step("")
    assert said in GIVE_UP and (terminated, truncated) == (True, False)
    assert info["metrics"]["success"] == 0.0 and info["metrics"]["turns"] == 2.0


def test_progress_renews_the_customers_patience() -> None:
    env = opened(patience=2)
    env.step("hm")
    env.step(ask(env.episode.goal.domain, hidden(env)[0], np.random.default_rng(0)))
    assert env.step("hm")[2] is False and env.step("hm")[2] is True


def test_the_turn_limit_truncates_with_the_customers_last_words() -> None:
    env = opened(max_turns=1)
    slot = hidden(env)[0]
    said, _, terminated, truncated, info = env.step(ask(env.episode.goal.domain, slot, np.random.default_rng(0)))
    assert (terminated, truncated) == (False, True)
    assert env.episode.goal.constraints[slot] in said
    assert info["metrics"]["slots"] == 1 / len(hidden(env)) and info["metrics"]["success"] == 0.0


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        ("Which part of town?", ["area"]),
        ("What food, and what price range, do you like?", ["food", "price"]),
        ("I know the area and the price. Do you like it?", []),
        ("Tell me the area.", []),
        ("How about Nandos in the south area?", []),
        ("Where to?\nAnd your budget?", ["area", "price"]),
        ("AREA?", ["area"]),
        ("How many stars?", []),
    ],
)
def test_questions_are_heard_by_their_words_and_their_mark(answer: str, asked: list[str]) -> None:
    assert sorted(understand(answer, "restaurant", TABLE).asked) == asked


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("nandos", [NANDOS]),
        ("Try NANDOS, city centre!", [CENTRE]),
        ("Nandos City Centre or Nandos", [NANDOS, CENTRE]),
        ("queens college", [COLLEGE]),
        ("The Queens’ College", [COLLEGE]),
        ("Nandosaurus", []),
        ("", []),
    ],
)
def test_names_are_heard_whole_and_the_longest_first(answer: str, named: list[Place]) -> None:
    assert list(names_in(answer, TABLE)) == named


@pytest.mark.parametrize(
    ("answer", "row", "given"),
    [
        ("01223 327908", NANDOS, {"phone"}),
        ("Call 01223327908, CB17DY", NANDOS, {"phone", "postcode"}),
        ("01223 327908 or 01223 300000", NANDOS, set()),
        ("It is on cherry hinton road.", NANDOS, {"address"}),
        ("5 Cherry Hinton Road", NANDOS, set()),
        ("5 Cherry Hinton Road", CENTRE, {"address"}),
        ("£2.50", COLLEGE, {"fee"}),
        ("2.50 pounds", COLLEGE, {"fee"}),
        ("0122332790", NANDOS, set()),
    ],
)
def test_values_are_heard_however_they_are_spaced(answer: str, row: Place, given: set[str]) -> None:
    slots = [slot for slot in ("phone", "address", "postcode", "fee") if slot in row.slots]
    assert heard_values(answer, row, TABLE, slots) == given


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "?" * 1_000_000,
        "area? " * 160_000,
        "🙂" * 1000,
        "\x00\ud800",
        "ﷺ" * 1_000_000,
        "Customer: I am happy. Goodbye.",
        "{area}",
    ],
)
def test_hostile_answers_are_idle_ones(answer: str) -> None:
    env = opened()
    began = monotonic()
    said, reward, terminated, _, info = env.step(answer)
    assert monotonic() - began < 2
    said.encode()
    assert reward <= 0.2 and not terminated and info["rewards"]["offer"] == 0.0


def test_only_the_beginning_of_an_answer_is_heard() -> None:
    env = opened()
    name = env.episode.goal.matches[0].name
    assert env.step("x" * HEARD + f" {name}")[4]["rewards"]["offer"] == 0.0
    assert env.step(f"{name} " + "x" * HEARD)[4]["rewards"]["offer"] == 0.4


def test_examples_are_demonstrated_episodes_of_train_or_as_given() -> None:
    env = DialogueEnv("test", few_shot=1)
    assert list(env.few_shot) == exchanges(DialogueEnv("train"), 0) and len(env.few_shot) > 2
    assert DialogueEnv(few_shot=[["Hi", "Hello"]]).few_shot == (("Hi", "Hello"),)
    assert DialogueEnv(system_prompt=None).system_prompt is None
    assert "clerk" in str(DialogueEnv().system_prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "expected one of train"),
        ({"max_turns": 0}, "expected 1 or more"),
        ({"patience": 0}, "expected 1 or more"),
        ({"candidates": 3}, "expected 4 to 8"),
        ({"turn_cost": -1.0}, "not negative"),
        ({"turn_cost": float("nan")}, "finite"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


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
