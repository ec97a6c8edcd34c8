"""`rollcast/Dialogue-v0`: the customer, the rules of understanding, and rewards."""

import re
from random import Random
from time import monotonic
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rollcast_envs.data.dialogue import CONSTRAINTS, Place
from rollcast_envs.splits import SPLITS, Split
from rollcast_envs.tasks.clerk import ask, heard_values, inform, names_in, offer, understand
from rollcast_envs.tasks.dialogue import (
    GIVE_UP,
    HEARD,
    NO_PREFERENCE,
    DialogueEnv,
    goals_of,
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
