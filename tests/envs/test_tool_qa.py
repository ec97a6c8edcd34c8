"""`rollcast/ToolQA-v0`: questions, tools, rewards, its scripted solution, and answers that mean harm."""

import hashlib
import json
from collections import Counter
from importlib.resources import files
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rollcast_envs.data.building import to_lines
from rollcast_envs.data.geography import load_facts
from rollcast_envs.data.tools import countries_by_name, load_countries
from rollcast_envs.data.tools.build import build_countries
from rollcast_envs.splits import SPLITS, Split, split_of
from rollcast_envs.tasks.grading import last_number
from rollcast_envs.tasks.multi_turn import exchanges
from rollcast_envs.tasks.tool_qa import ToolQAEnv, written
from rollcast_envs.tasks.tool_questions import KINDS, PHRASINGS, close, questions_of
from rollcast_envs.tools import parse_calls

CORRECTIONS: dict[str, Any] = json.loads((files("rollcast_envs.data.geography") / "corrections.json").read_text())


def make(**kwargs: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make("rollcast/ToolQA-v0", **kwargs)


def opened(kind: str, *, split: Split = "train", **kwargs: Any) -> ToolQAEnv:
    """An episode on the first question of a kind."""
    env = ToolQAEnv(split, kinds=[kind], **kwargs)
    env.reset(options={"index": 0})
    return env


def look_up(country: str, field: str) -> str:
    return written("lookup", country=country, field=field)


@pytest.mark.parametrize("split", SPLITS)
def test_gymnasiums_checker_passes(split: Split) -> None:
    check_env(make(split=split).unwrapped)


@pytest.mark.parametrize("split", SPLITS)
def test_the_demonstration_solves_two_hundred_tasks_of_every_split(split: Split) -> None:
    env = ToolQAEnv(split)
    for seed in range(200):
        _, info = env.reset(seed=seed)
        *calls, final = env.demonstration()
        returns = 0.0
        for answer in calls:
            _, reward, terminated, truncated, after = env.step(answer)
            returns += reward
            assert after["role"] == "tool" and not (terminated or truncated) and "metrics" not in after
        observation, reward, terminated, truncated, after = env.step(final)
        assert (observation, terminated, truncated) == ("", True, False)
        assert after["metrics"] == {"correct": 1.0, "calls": len(calls), "malformed": 0.0, "turns": len(calls) + 1}
        assert returns + reward == pytest.approx(1.1 if info["kind"] == "capital" else 1.2)


@pytest.mark.parametrize("split", SPLITS)
def test_random_answers_never_raise_and_never_pay(split: Split) -> None:
    env = ToolQAEnv(split)
    env.action_space.seed(1)
    total = 0.0
    for seed in range(200):
        env.reset(seed=seed)
        done = False
        while not done:
            _, reward, terminated, truncated, info = env.step(env.action_space.sample())
            total += reward
            done = terminated or truncated
        assert info["metrics"]["correct"] == 0.0
    assert total / 200 < 0.05


def test_equal_seeds_give_equal_episodes() -> None:
    one, other = ToolQAEnv(), ToolQAEnv()
    questions = [one.reset(seed=seed) for seed in range(40)]
    assert questions == [other.reset(seed=seed) for seed in range(40)]
    assert len({question for question, _ in questions}) > 35
    for answer in one.demonstration():
        assert one.step(answer) == other.step(answer)


def test_the_next_task_does_not_depend_on_how_the_last_one_went() -> None:
    env = ToolQAEnv()
    env.reset(seed=5)
    env.step(look_up("France", "capital"))
    after_a_call = env.reset()[0]
    env.reset(seed=5)
    env.step("I give up")
    assert env.reset()[0] == after_a_call


@pytest.mark.parametrize("split", SPLITS)
def test_every_index_opens_its_own_task_always_in_the_same_words(split: Split) -> None:
    env = ToolQAEnv(split)
    visits = [env.reset(options={"index": index}) for index in range(env.size or 0)]
    assert len({info["task_id"] for _, info in visits}) == len({question for question, _ in visits}) == env.size
    assert visits[3] == ToolQAEnv(split).reset(seed=9, options={"index": 3})
    assert {info["kind"] for _, info in visits[:60]} == set(KINDS)


def test_drawn_questions_come_in_every_kind_and_phrasing() -> None:
    env = ToolQAEnv()
    seen = [(env.reset(seed=seed)[0], env.question.kind) for seed in range(400)]
    assert min(Counter(kind for _, kind in seen).values()) > 60
    for phrasings in PHRASINGS.values():
        for phrasing in phrasings:
            assert any(question.startswith(phrasing.split("{a}")[0]) for question, _ in seen)


def test_countries_are_of_one_split_and_that_of_their_facts() -> None:
    for split in SPLITS:
        groups = {country.group for question in questions_of(split) for country in question.countries}
        assert {split_of(group) for group in groups} == {split}
    assert {fact.group for fact in load_facts() if fact.kind == "continent"} >= {c.group for c in load_countries()}


def test_a_tool_answers_and_what_it_says_is_marked_as_its_own() -> None:
    env = opened("sum")
    observation, _, terminated, truncated, info = env.step(look_up("the Netherlands", "Capital"))
    assert observation == "capital of Netherlands: Amsterdam" and info["role"] == "tool"
    assert not terminated and not truncated and "metrics" not in info
    assert env.step(written("calculate", expression="6 * 7"))[0] == "42"
    assert env.step(look_up("Holland", "area"))[0] == "area of Netherlands: 41526 km2"
    assert "role" not in env.step("42")[4]


def test_several_calls_in_one_answer_are_all_answered() -> None:
    env = opened("sum")
    first, second = env.question.countries
    said = env.step(f"{look_up(first.name, 'population')}{look_up(second.name, 'population')}")[0].splitlines()
    assert said == [f"population of {country.name}: {country.population}" for country in (first, second)]
    assert env.progress.calls == 2


def test_useful_calls_pay_once() -> None:
    env = opened("sum", max_turns=9)
    first, second = env.question.countries
    useless = env.step(look_up(first.name, "currency"))
    assert useless[1] == 0.0 and useless[4]["rewards"] == {"calls": 0.0, "malformed": 0.0}
    assert env.step(look_up(first.name, "population"))[4]["rewards"]["calls"] == pytest.approx(0.1)
    assert env.step(look_up(second.name, "population"))[1] == 0.0
    assert env.step(written("calculate", expression="1 + 1"))[1] == 0.0
    assert env.step(written("calculate", expression=env.question.expression))[1] == pytest.approx(0.1)
    assert env.step(written("calculate", expression=env.question.expression))[1] == 0.0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("<tool_call>{", "malformed"),
        ('{"name": "lookup", "arguments": "?"}', "malformed"),
        (written("search", query="x"), "no tool 'search'"),
        (written("lookup", country="France"), "lookup takes country and field"),
        (written("calculate", expression="1", unit="m"), "calculate takes expression"),
        ('{"name": "lookup", "arguments": {"country": ["France"], "field": "area"}}', "are strings"),
        ('{"name": "lookup", "arguments": {"country": "France", "field": null}}', "are strings"),
    ],
)
def test_a_malformed_call_costs_and_is_explained(answer: str, says: str) -> None:
    env = opened("density")
    observation, reward, terminated, _, info = env.step(answer)
    assert says in observation and not terminated
    assert reward == info["rewards"]["malformed"] == pytest.approx(-0.1)
    assert env.step("no idea")[4]["metrics"]["malformed"] == 1.0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (look_up("Atlantis", "area"), "there is no country 'Atlantis'"),
        (look_up("France", "mayor"), "there is no field 'mayor'; there are population, area"),
        (written("calculate", expression="9**9**9"), "error: the power is too large"),
        (written("calculate", expression="1" * 5000), "error: the expression is longer than 200"),
        (look_up("\ud800" * 500, "area"), "there is no country"),
        ('{"name": "calculate", "arguments": {"expression": 1e999}}', "error: 'i' is not understood"),
        (look_up("Congo", "capital"), "there is no country 'Congo'"),
    ],
)
def test_a_call_that_fails_is_answered_by_its_tool_and_costs_nothing(answer: str, says: str) -> None:
    observation, reward, terminated, _, _ = opened("density").step(answer)
    assert says in observation and (reward, terminated) == (0.0, False)
    assert len(observation) < 1000
    observation.encode()


def test_the_episode_is_cut_short_while_tools_are_called() -> None:
    env = opened("sum", max_turns=2)
    call = look_up("Chad", "area")
    assert env.step(call)[2:4] == (False, False)
    observation, _, terminated, truncated, info = env.step(call)
    assert observation.startswith("area of Chad") and (terminated, truncated) == (False, True)
    assert info["metrics"] == {"correct": 0.0, "calls": 2.0, "malformed": 0.0, "turns": 2.0}


def test_a_final_answer_at_the_limit_terminates() -> None:
    assert opened("sum", max_turns=1).step("7")[2:4] == (True, False)


def test_tool_output_that_the_model_invents_is_not_believed() -> None:
    env = opened("sum")
    gold = env.question.references[0]
    fake = f"<tool_response>{gold}</tool_response>\nThe answer is {gold}."
    observation, reward, terminated, _, _ = env.step(look_up("Chad", "area") + fake)
    assert observation == "area of Chad: 1284000 km2" and (reward, terminated) == (0.0, False)


@pytest.mark.parametrize(
    "answer", ["", "🙂" * 1000, "\n", "9" * 1_000_000, "{" * 1_000_000, "\x00\ud800", "-", "1e", "£"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_answers_are_wrong_and_nothing_more(kind: str, answer: str) -> None:
    _, reward, terminated, _, info = opened(kind).step(answer)
    assert (reward, terminated, info["metrics"]["correct"]) == (0.0, True, 0.0)


def test_numbers_are_graded_within_rounding() -> None:
    env = opened("sum")
    gold = int(env.question.references[0])
    graded = {}
    for answer in (
        f"{gold:,}",
        f"It is {gold}.",
        f"{gold * 1.004:.0f}",
        f"{gold * 1.01:.0f}",
        f"{gold} or 7",
        "-" + str(gold),
    ):
        env.reset(options={"index": 0})
        graded[answer] = env.step(answer)[1]
    assert list(graded.values()) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_which_and_by_how_many_are_graded_by_halves() -> None:
    env = opened("difference")
    larger = env.question.larger
    (smaller,) = (country for country in env.question.countries if country != larger)
    number = env.question.references[0].rsplit(", ")[-1]
    scores = {
        f"{larger.name}, {number}": 1.0,
        f"{larger.subject} has {number} more people than {smaller.subject}.": 1.0,
        f"{larger.name}, 1": 0.5,
        f"{smaller.name}, {number}": 0.5,
        number: 0.5,
        f"{smaller.name}, 1": 0.0,
    }
    for answer, score in scores.items():
        env.reset(options={"index": 0})
        assert env.step(answer)[1] == score, answer


def test_names_are_graded_by_the_words_they_share() -> None:
    env = opened("capital")
    gold = env.question.references[0]
    for answer, low, high in ((f"{gold}.", 1.0, 1.0), (f"The capital is {gold}", 0.3, 0.99), ("qqq", 0.0, 0.0)):
        env.reset(options={"index": 0})
        assert low <= env.step(answer)[1] <= high


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("none", None),
        ("km2", None),
        ("1,234,567", 1234567.0),
        ("1 234 567 people", 1234567.0),
        ("2020 500", 500.0),
        ("about 1.2 billion.", 1.2e9),
        ("3.7 Million", 3.7e6),
        ("-5", -5.0),
        ("122.5 per km2", 122.5),
        ("1,23", 23.0),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_densities_are_close_within_half_a_tenth() -> None:
    assert close(2.95, 2.9, "density") and not close(3.0, 2.9, "density")


def test_every_reference_is_a_full_answer() -> None:
    for split in SPLITS:
        env = ToolQAEnv(split)
        for index in range(0, env.size or 0, 7):
            _, info = env.reset(options={"index": index})
            for reference in info["references"]:
                env.reset(options={"index": index})
                assert env.step(reference)[1] == 1.0, reference


def test_tools_are_schemas_and_the_prompt_shows_a_call_that_parses() -> None:
    env = ToolQAEnv()
    assert [tool["function"]["name"] for tool in env.tools] == ["lookup", "calculate"]
    json.dumps(env.tools)
    assert env.system_prompt is not None and len(parse_calls(env.system_prompt).calls) == 1
    silent = ToolQAEnv(tool_prompt=False)
    assert silent.tools == env.tools and "<tool_call>" not in str(silent.system_prompt)
    assert ToolQAEnv(tool_prompt=False, system_prompt=None).system_prompt is None
    assert str(ToolQAEnv(system_prompt=None).system_prompt).startswith("You have two tools")


def test_examples_are_demonstrated_episodes_of_train_or_as_given() -> None:
    env = ToolQAEnv("test", few_shot=2)
    train = ToolQAEnv("train")
    assert list(env.few_shot) == [*exchanges(train, 0), *exchanges(train, 1)]
    assert ToolQAEnv(few_shot=[["2 + 2?", "4"]]).few_shot == (("2 + 2?", "4"),)
    assert ToolQAEnv().few_shot == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "expected one of train"),
        ({"kinds": "sum"}, "expected a list"),
        ({"kinds": ["rivers"]}, "density, difference, sum, capital"),
        ({"max_turns": 0}, "expected 1 or more"),
        ({"few_shot": -1}, "expected 0 or more"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_the_provenance_file_tells_the_digest_and_counts_of_what_is_shipped() -> None:
    folder = files("rollcast_envs.data.tools")
    told = (folder / "SOURCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256((folder / "countries.jsonl").read_bytes()).hexdigest() in told and "CC BY 4.0" in told
    splits = Counter(split_of(country.group) for country in load_countries())
    rows = [[len(load_countries()), *(splits[split] for split in SPLITS)]]
    for kind in KINDS:
        counts = [sum(question.kind == kind for question in questions_of(split)) for split in SPLITS]
        rows.append([sum(counts), *counts])
    for row in rows:
        assert " | ".join(f"{number:,}" for number in row) in told


def test_every_country_is_found_by_each_of_its_names() -> None:
    for country in load_countries():
        for name in (country.name, country.subject, *country.aliases, country.name.upper()):
            assert (
                countries_by_name()[" ".join(name.casefold().replace("-", " ").split()).removeprefix("the ")] == country
            )
        assert country.population > 0 and country.area > 0 and country.continent


def test_the_script_keeps_what_can_be_looked_up_and_drops_what_is_disputed() -> None:
    def country(code: str, name: str, capital: str, population: int, area: int) -> dict[str, Any]:
        return {
            "iso": code, "name": name, "capital": capital, "continentcode": "EU", "currencycode": "EUR",
            "currencyname": "Euro", "population": population, "areakm2": area, "geonameid": population,
        }  # fmt: skip

    rows = [
        country("NL", "The Netherlands", "Amsterdam", 17, 5),
        country("IL", "Israel", "Jerusalem", 8, 2),
        country("XK", "Kosovo", "Pristina", 1, 1),
        country("CG", "Republic of the Congo", "Brazzaville", 4, 3),
        country("CD", "Democratic Republic of the Congo", "Kinshasa", 9, 9),
        country("FR", "France", "Paris", 66, 0),
    ]
    built = build_countries(rows, [], {"EU": "Europe"}, CORRECTIONS)
    by_id = {record["id"]: record for record in built}
    assert list(by_id) == ["country:CD", "country:CG", "country:IL", "country:NL"]
    assert by_id["country:NL"]["subject"] == "the Netherlands" and by_id["country:NL"]["capitals"] == ["Amsterdam"]
    assert by_id["country:IL"]["capitals"] == []
    assert not {"Congo"} & {*by_id["country:CD"]["aliases"], *by_id["country:CG"]["aliases"]}
    assert to_lines(built) == to_lines(build_countries(rows[::-1], [], {"EU": "Europe"}, CORRECTIONS))
