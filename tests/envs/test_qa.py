"""`rollcast/QA-v0` as people use it: made by id, seeded, visited by index, in vectors, on clean splits."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from rollcast_envs.data.geography import KINDS, Fact, load_facts
from rollcast_envs.errors import DataError
from rollcast_envs.splits import SPLITS, Split, position, split_of
from rollcast_envs.tasks.qa import PHRASINGS, QAEnv

FIRST_RELEASE = "29c974c4d58e414d95f8840daaf0cbae7fdad0be7cc5cfe866110c53c3c6f640"
"""sha256 of 500 questions, drawn by the seeds 0 to 499, as the first QAEnv asked them."""


def make(**kwargs: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make("rollcast/QA-v0", **kwargs)


def facts_of(split: Split) -> list[Fact]:
    """The facts of a split in the order in which they are asked."""
    return sorted((fact for fact in load_facts() if split_of(fact.group) == split), key=lambda fact: position(fact.id))


@pytest.mark.parametrize("split", SPLITS)
def test_gymnasiums_checker_passes(split: Split) -> None:
    check_env(make(split=split).unwrapped)


def test_equal_seeds_give_equal_questions_and_different_seeds_differ() -> None:
    env = make()
    questions = [env.reset(seed=seed)[0] for seed in range(50)]
    assert questions == [make().reset(seed=seed)[0] for seed in range(50)]
    assert len(set(questions)) > 45


def test_one_seed_then_goes_on_to_other_questions() -> None:
    env = make()
    first, second = env.reset(seed=3)[0], env.reset()[0]
    assert first != second
    assert (env.reset(seed=3)[0], env.reset()[0]) == (first, second)


@pytest.mark.parametrize("split", SPLITS)
def test_every_index_opens_its_own_task_always_in_the_same_words(split: Split) -> None:
    env = QAEnv(split=split)
    visits = [env.reset(options={"index": index}) for index in range(env.size or 0)]
    assert [info["task_id"] for _, info in visits] == [fact.id for fact in facts_of(split)]
    assert len({question for question, _ in visits}) == env.size
    assert visits[7] == QAEnv(split=split).reset(seed=9, options={"index": 7})
    with pytest.raises(ValueError, match=f"from 0 to {len(visits) - 1}"):
        env.reset(options={"index": len(visits)})


def test_the_right_answer_earns_its_f1_less_the_cost_of_length() -> None:
    env = make(length_cost=0.01)
    _, info = env.reset(seed=1)
    observation, reward, terminated, truncated, after = env.step(info["references"][0])
    assert (observation, terminated, truncated) == ("", True, False)
    assert reward == pytest.approx(1 - 0.01 * len(info["references"][0]))
    rewards = {"f1": 1.0, "length": -0.01 * len(info["references"][0])}
    assert after == {**info, "rewards": rewards, "metrics": {"f1": 1.0, "exact_match": 1.0}}


def test_of_two_wrong_answers_the_shorter_is_the_better_one() -> None:
    env = make()
    rewards = []
    for answer in ("qqq", "I am not sure about that qqq"):
        env.reset(seed=1)
        rewards.append(env.step(answer)[1])
    assert rewards[0] > rewards[1] > -0.05


def test_an_empty_answer_scores_nothing_and_costs_nothing() -> None:
    env = make()
    env.reset(seed=1)
    assert env.step("")[1] == 0.0


def test_every_reference_of_every_fact_is_a_full_answer() -> None:
    for split in SPLITS:
        env = QAEnv(split=split)
        for index, fact in enumerate(facts_of(split)):
            for reference in fact.references:
                env.reset(options={"index": index})
                assert env.step(f" {reference}.")[4]["metrics"] == {"f1": 1.0, "exact_match": 1.0}


def test_stepping_out_of_turn_is_refused() -> None:
    env = make()
    with pytest.raises(ResetNeeded):
        env.step("Paris")
    env.reset()
    env.step("Paris")
    with pytest.raises(ResetNeeded):
        env.step("Paris")


def test_vectors_of_environments_play_on_by_themselves() -> None:
    vector = SyncVectorEnv([make] * 3)
    questions, _ = vector.reset(seed=[1, 2, 3])
    assert list(questions) == [make().reset(seed=seed)[0] for seed in (1, 2, 3)]
    _, rewards, terminated, truncated, infos = vector.step(("Paris", "", "日本\n🙂"))
    assert terminated.all() and not truncated.any()
    assert rewards[1] == 0.0 and len(infos["task_id"]) == 3
    assert all(vector.step(("", "", ""))[0])
    vector.close()


def test_kinds_and_prompts_can_be_chosen() -> None:
    env = QAEnv(split="test", kinds=["capital"], system_prompt=None)
    assert {record["kind"] for record in env.records} == {"capital"} and env.system_prompt is None
    assert env.size is not None and 0 < env.size < len(facts_of("test"))
    assert QAEnv().system_prompt == "Answer with the name only."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "expected one of train"),
        ({"kinds": "capital"}, "expected a list"),
        ({"kinds": []}, "expected a list"),
        ({"kinds": ["rivers"]}, "capital, continent, country, currency"),
        ({"length_cost": -1.0}, "not negative"),
        ({"length_cost": float("nan")}, "finite"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_drawn_questions_come_in_every_phrasing() -> None:
    env = make()
    questions = {env.reset(seed=seed)[0] for seed in range(2000)}
    for kind, phrasings in PHRASINGS.items():
        for phrasing in phrasings:
            before, after = phrasing.split("{subject}")
            assert any(q.startswith(before) and q.endswith(after) for q in questions), (kind, phrasing)


def test_a_group_of_samples_sees_one_question() -> None:
    assert len({make().reset(seed=11)[0] for _ in range(8)}) == 1


def test_importing_the_package_registers_the_id_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, rollcast_envs, gymnasium; assert 'rollcast/QA-v0' in gymnasium.registry;"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'rollcast_envs.tasks.qa'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_are_over_a_thousand_facts_of_every_kind() -> None:
    facts = load_facts()
    assert len(facts) >= 1000 and len({fact.id for fact in facts}) == len(facts)
    counts = Counter(fact.kind for fact in facts)
    assert set(counts) == set(KINDS) == set(PHRASINGS) and min(counts.values()) > 200
    assert len({(fact.kind, fact.subject) for fact in facts}) == len(facts)
    assert sum(len(facts_of(split)) for split in SPLITS) == len(facts)


def test_no_group_and_no_fact_is_in_two_splits() -> None:
    for shared in ("group", "id", "subject"):
        seen = [{getattr(fact, shared) for fact in facts_of(split)} for split in SPLITS]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2]), shared


def test_the_country_of_a_capital_is_not_asked_where_its_capital_is_held_out() -> None:
    """ "Paris is the capital of France" and "Paris is in France" give each other away."""
    facts = load_facts()
    capital_of = {
        (name.casefold(), f.subject.removeprefix("the ")): f
        for f in facts
        if f.kind == "capital"
        for name in f.references
    }
    pairs = [
        (city, capital_of[city.subject.casefold(), city.references[0]])
        for city in facts
        if city.kind == "country" and (city.subject.casefold(), city.references[0]) in capital_of
    ]
    assert len(pairs) > 90
    assert all(city.group == capital.group for city, capital in pairs)
    assert {split_of(city.group) for city, _ in pairs} == set(SPLITS)


def test_no_question_holds_its_answer_and_no_city_answer_dominates() -> None:
    cities = [fact for fact in load_facts() if fact.kind == "country"]
    assert not [fact for fact in cities if f" {fact.references[0]} " in f" {fact.subject} "]
    (_, most), *_ = Counter(fact.references[0] for fact in cities).most_common(1)
    assert most <= 10


def test_aliases_count_as_answers() -> None:
    accepted = {fact.id: set(fact.references) for fact in load_facts()}
    assert {"Brasilia", "Brasília"} <= accepted["capital:BR"]
    assert {"Kyiv", "Kiev"} <= accepted["capital:UA"]
    assert {"Dollar", "Canadian dollar"} <= accepted["currency:CA"]
    assert {"Europe", "Asia"} <= accepted["continent:TR"]
    assert any({"United States", "USA"} <= names for names in accepted.values())


def test_disputed_questions_are_left_out() -> None:
    ids = {fact.id for fact in load_facts()}
    assert not ids & {"capital:IL", "capital:TW", "capital:EH", "continent:XK", "currency:PS", "currency:BG"}
    assert not {fact.subject for fact in load_facts()} & {
        "Jerusalem",
        "Sevastopol",
        "Donetsk",
        "Srinagar",
        "Taipei",
    }


def test_drawn_questions_are_those_of_the_first_release() -> None:
    env = QAEnv()
    questions = "\n".join(env.reset(seed=seed)[0] for seed in range(500))
    assert hashlib.sha256(questions.encode()).hexdigest() == FIRST_RELEASE


@pytest.mark.parametrize("split", SPLITS)
def test_reading_questions_follow_their_text_and_references_earn_everything(split: Split) -> None:
    check_env(make(split=split, data="reading").unwrapped)
    env = QAEnv(split, data="reading", length_cost=0)
    kinds = Counter[str]()
    for index in range(env.size or 0):
        question, info = env.reset(options={"index": index})
        record = info["fields"]
        hint = 'If the text does not say, answer "unanswerable".'
        assert question == f"{record['context']}\n\n{record['question']}\n{hint}"
        assert env.step(info["references"][0])[1] == 1.0
        kinds[info["kind"]] += 1
    assert set(kinds) == {"person", "place", "unanswerable"}


def test_two_hundred_random_reading_episodes_and_hostile_answers() -> None:
    env, again = make(data="reading"), make(data="reading")
    env.action_space.seed(3)
    for seed in range(200):
        assert env.reset(seed=seed) == again.reset(seed=seed)
        assert -1 < env.step(env.action_space.sample())[1] <= 1
    for answer in ("", "\x00", "🙂" * 100, "the a an", "((" * 100):
        env.reset(seed=1)
        assert -1 < env.step(answer)[1] <= 1


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        ("", 1.0),
        ("The.", 1.0),
        ("Unanswerable.", 1.0),
        ("no answer", 0.0),
        ("unanswerable, I think", 0.0),
        ("Rome", 0.0),
    ],
)
def test_a_question_without_an_answer_follows_the_rule_of_squad_v2(answer: str, f1: float) -> None:
    env = QAEnv(data="reading", kinds=["unanswerable"], length_cost=0)
    _, info = env.reset(seed=2)
    assert info["references"] == ["unanswerable"] and info["fields"]["references"] == []
    _, reward, _, _, after = env.step(answer)
    assert reward == f1 and after["metrics"] == {"f1": f1, "exact_match": f1}


def test_words_for_no_answer_can_be_chosen() -> None:
    env = QAEnv(data="reading", kinds=["unanswerable"], no_answer=["not given", "unknown"], length_cost=0)
    question, info = env.reset(seed=2)
    assert 'answer "not given"' in question and info["references"] == ["not given"]
    assert env.step("Unknown")[1] == 1.0
    silent = QAEnv(data="reading", kinds=["unanswerable"], no_answer="")
    question, info = silent.reset(seed=2)
    assert question.endswith(info["fields"]["question"]) and info["references"] == [""] and silent.step("")[1] == 1.0


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "context": "Rome lies on the Tiber.",
                    "qas": [
                        {
                            "id": "a",
                            "question": "Where does Rome lie?",
                            "answers": [
                                {"text": "on the Tiber", "answer_start": 10},
                                {"text": "Tiber", "answer_start": 17},
                            ],
                            "is_impossible": False,
                        },
                        {"id": "b", "question": "Who founded Rome?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def test_squads_files_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "dev-v2.0.json"
    file.write_text(json.dumps(SQUAD), encoding="utf-8")
    env = QAEnv("validation", data={"validation": str(file)}, length_cost=0)
    found = {info["task_id"]: (question, info) for question, info in (env.reset(options={"index": i}) for i in (0, 1))}
    question, info = found["a"]
    assert question.startswith("Rome lies on the Tiber.\n\nWhere does Rome lie?\n")
    assert info["references"] == ["on the Tiber", "Tiber"] and found["b"][1]["references"] == ["unanswerable"]
    index = next(i for i in (0, 1) if env.reset(options={"index": i})[1]["task_id"] == "a")
    env.reset(options={"index": index})
    assert env.step("the Tiber")[4]["metrics"] == {"f1": 1.0, "exact_match": 1.0}


def test_a_table_of_ones_own_with_examples_before_each_question(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    rows = [f'{split},What is {n} plus one?,"[""{n + 1}"", ""{n + 1}.0""]"' for split in SPLITS for n in range(4)]
    table.write_text("split,body,answer\n" + "\n".join(rows) + "\n", encoding="utf-8")
    env = QAEnv("test", data=str(table), fields={"question": "body", "references": "answer"}, few_shot=2)
    question, info = env.reset(options={"index": 0})
    assert question.startswith("What is") and "\n" not in question and len(info["references"]) == 2
    assert len(env.few_shot) == 2 and all(example.startswith("What is") for example, _ in env.few_shot)
    with pytest.raises(DataError, match=r"kinds is \['sums'\].*no kind"):
        QAEnv("test", kinds=["sums"], data=str(table), fields={"question": "body", "references": "answer"})
