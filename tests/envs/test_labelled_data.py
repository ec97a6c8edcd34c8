"""The built-in data of classification, extraction and reading: what is shipped, and how it was chosen."""

import hashlib
import json
import unicodedata
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

from rollcast_envs.data import wordnet
from rollcast_envs.data.building import ALIKE, likeness, to_lines
from rollcast_envs.data.entities import build as entities
from rollcast_envs.data.entities.sentences import Limits, Name, Sentence, names_of, sentences
from rollcast_envs.data.reading import build as reading
from rollcast_envs.data.sentiment import build as sentiment
from rollcast_envs.data.topics import build as topics
from rollcast_envs.data.wordnet import Synset, archive_member, read_gloss, read_synset
from rollcast_envs.splits import SPLITS, split_of

TEXT = {"entities": "text", "reading": "context", "sentiment": "text", "topics": "text"}
SETS = sorted(TEXT)


def shipped(name: str) -> list[dict[str, Any]]:
    text = (files("rollcast_envs.data") / name / "records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", SETS)
def test_a_file_is_small_and_is_what_its_script_writes(name: str) -> None:
    raw = (files("rollcast_envs.data") / name / "records.jsonl").read_bytes()
    assert len(raw) <= 700_000
    assert to_lines(shipped(name)).encode() == raw
    assert raw.decode() == unicodedata.normalize("NFC", raw.decode())


@pytest.mark.parametrize("name", SETS)
def test_ids_and_texts_are_unique_and_groups_are_of_one_split(name: str) -> None:
    records = shipped(name)
    assert len(records) >= 1500
    ids = [record["id"] for record in records]
    assert ids == sorted(set(ids)) and all(i.startswith(f"{name}:") for i in ids)
    assert len({record[TEXT[name]] for record in records}) == len(records)
    counts = Counter(split_of(record["group"]) for record in records)
    assert all(0.7 < counts["train"] / len(records) < 0.9 and counts[split] >= 140 for split in SPLITS)


@pytest.mark.parametrize("name", SETS)
def test_no_held_out_text_has_a_near_duplicate_in_another_split(name: str) -> None:
    texts = {split: [r[TEXT[name]] for r in shipped(name) if split_of(r["group"]) == split] for split in SPLITS}
    assert likeness(texts["test"], texts["train"] + texts["validation"]).max() < ALIKE
    assert likeness(texts["validation"], texts["train"]).max() < ALIKE


@pytest.mark.parametrize("name", SETS)
def test_the_provenance_file_tells_digest_counts_and_licence(name: str) -> None:
    folder = files("rollcast_envs.data") / name
    told = (folder / "SOURCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest() in told
    counts = Counter(split_of(record["group"]) for record in shipped(name))
    assert f"| all | {sum(counts.values()):,} | " + " | ".join(f"{counts[split]:,}" for split in SPLITS) in told
    if name == "sentiment":
        assert sentiment.SHA256 in told and "Hutto" in told and "Copyright (c) 2016 C.J. Hutto" in licence(name)
    else:
        assert wordnet.SHA256 in told and wordnet.NOTICE in told and "derived" in told
        assert "Permission to use, copy, modify and distribute" in licence(".")


def licence(folder: str) -> str:
    (found,) = [path for path in (files("rollcast_envs.data") / folder).iterdir() if path.name.startswith("LICENSE")]
    return found.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["sentiment", "topics"])
def test_each_split_has_as_many_records_of_each_label(name: str) -> None:
    counts = Counter((split_of(record["group"]), record["label"]) for record in shipped(name))
    labels = {label for _, label in counts}
    assert labels == (set(topics.LABELS.values()) if name == "topics" else {"positive", "negative"})
    for split in SPLITS:
        assert len({counts[split, label] for label in labels}) == 1


def test_no_definition_says_its_label() -> None:
    assert not [r for r in shipped("topics") if f" {r['label']} " in f" {r['text'].lower()} "]


def test_tweets_have_clear_ratings_and_no_addresses() -> None:
    for record in shipped("sentiment"):
        assert abs(record["rating"]) >= 1 and (record["rating"] > 0) == (record["label"] == "positive")
        assert not {"&amp;", "&lt;", "&quot;", "http"} & set(record["text"].split()) and "@" not in record[
            "text"
        ].replace("@anonymous", "")


def test_entities_stand_in_their_sentence_and_no_name_is_in_two_splits() -> None:
    where: dict[str, set[str]] = {}
    types = Counter[str]()
    for record in shipped("entities"):
        for entity in record["entities"]:
            assert entity["text"] in record["text"]
            where.setdefault(entity["text"], set()).add(split_of(record["group"]))
            types[entity["type"]] += 1
    assert all(len(splits) == 1 for splits in where.values())
    assert set(types) == {"LOC", "ORG", "PER"} and max(types.values()) < 3 * min(types.values())
    assert sum(not record["entities"] for record in shipped("entities")) >= 100


def test_reading_answers_stand_in_the_text_and_none_dominates() -> None:
    records = shipped("reading")
    answers = Counter(record["references"][0] for record in records if record["references"])
    assert max(answers.values()) <= reading.PER_NAME
    assert all(record["references"][0] in record["context"] for record in records if record["references"])
    kinds = Counter(record["kind"] for record in records)
    assert set(kinds) == {"place", "person", "unanswerable"} and min(kinds.values()) >= 400
    assert all((record["kind"] == "unanswerable") == (not record["references"]) for record in records)
    asked = Counter(record["question"] for record in records)
    assert set(asked) == {question for questions in reading.QUESTIONS.values() for question in questions}


def invented(number: int) -> str:
    """A text that is like no other."""
    return hashlib.sha256(str(number).encode()).hexdigest().translate(str.maketrans("0123456789", "ghijk mnop"))


def test_tweets_are_tidied_labelled_and_balanced() -> None:
    ratings = [(str(number), 2.5 - 1.25 * (number % 5), invented(number)) for number in range(400)]
    odd = [(3.0, "Fun &amp; games"), (2.0, "FUN & games"), (-3.0, "ask me@here.com @me"), (3.0, "great"),
           (-1.2, "so  SAD http://url_removed")]  # fmt: skip
    ratings = [(f"odd {number}", *pair) for number, pair in enumerate(odd)] + ratings
    records = sentiment.build(ratings)
    assert [record["id"] for record in records] == sorted(record["id"] for record in records)
    assert to_lines(records) == to_lines(sentiment.build(ratings))
    counts = Counter((split_of(record["group"]), record["label"]) for record in records)
    assert all(counts[split, "positive"] == counts[split, "negative"] > 0 for split in SPLITS)
    assert all(abs(record["rating"]) >= 1 for record in records)
    assert not {"FUN & games", "ask me@here.com @me", "great"} & {record["text"] for record in records}
    assert sentiment.tidy(odd[0][1]) == "Fun & games" and sentiment.tidy(odd[-1][1]) == "so SAD"


LINE = (
    "08932568 15 n 02 Paris 0 City_of_Light 0 002 @i 08691669 n 0000 #p 08929922 n 0000 "
    '| the capital of France; "we met in Paris"; "the last time I saw Paris"- Hammerstein  '
)


def test_a_line_of_wordnet_is_read_as_its_manual_says() -> None:
    synset = read_synset(LINE)
    assert synset == Synset(
        id="n:08932568",
        category="noun.location",
        words=("Paris", "City of Light"),
        definition="the capital of France",
        examples=("we met in Paris",),
        kinds=(),
        instance_of=("n:08691669",),
    )
    assert read_gloss('big (for example "huge")') == ("big (for example", ("huge",))


def test_a_member_of_a_package_is_found_behind_one_of_odd_length() -> None:
    def member(name: str, body: bytes) -> bytes:
        return (
            f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(body):<10}`\n".encode()
            + body
            + b"\n"[: len(body) % 2]
        )

    package = b"!<arch>\n" + member("debian-binary", b"2.0") + member("data.tar.xz", b"here")
    assert archive_member(package, "data.tar.xz") == b"here"
    with pytest.raises(SystemExit, match="control"):
        archive_member(package, "control")
    with pytest.raises(SystemExit, match="sha256"):
        wordnet.read_package(package)


def synset(key: str, category: str, words: str, *, gloss: str = "", kind: str = "", one_of: str = "") -> Synset:
    definition, examples = read_gloss(gloss)
    of, instance = (tuple(part.split()) for part in (kind, one_of))
    return Synset(key, category, tuple(words.split(",")), definition, examples, of, instance)


SYNSETS = [
    synset("n:1", "noun.location", "city"),
    synset("n:2", "noun.person", "painter", gloss='an artist; "the painter went to Rome"'),
    synset("n:08008335", "noun.group", "organization"),
    synset("n:3", "noun.location", "Rome,Eternal City", gloss="a city in Italy", one_of="n:1"),
    synset("n:4", "noun.person", "Raphael", gloss='a painter; "Raphael worked in Rome"', one_of="n:2"),
    synset("n:5", "noun.group", "United Nations,UN", kind="n:08008335", gloss='states; "the UN met Raphael Sanzio"'),
    synset("n:6", "noun.group", "Labor", kind="n:08008335", gloss='workers; "the French joined the UN"'),
    synset("n:7", "noun.act", "labor", gloss='work; "Labor won the vote in Rome"'),
    synset("n:8", "noun.location", "Austen", one_of="n:1"),
    synset("n:9", "noun.person", "Austen", gloss='a writer; "we read Austen"', one_of="n:2"),
    synset("a:1", "adj.pert", "French", gloss='of France; "he knew Rome from French books"'),
]


def test_names_are_of_one_type_in_all_their_readings() -> None:
    found = names_of(SYNSETS)
    assert {name: found[name].type for name in found} == {
        "Rome": "LOC",
        "Eternal City": "LOC",
        "Raphael": "PER",
        "United Nations": "ORG",
        "UN": "ORG",
    }
    assert found["UN"].key == found["United Nations"].key != found["Rome"].key


def test_sentences_count_only_if_every_capital_is_explained() -> None:
    found = {sentence.text: [(n.type, n.text) for n in sentence.names] for sentence in sentences(SYNSETS)}
    assert found["Raphael worked in Rome"] == [("PER", "Raphael"), ("LOC", "Rome")]
    assert found["he knew Rome from French books"] == [("LOC", "Rome")]
    assert found["the French joined the UN"] == [("ORG", "UN")]
    assert found["a painter"] == []
    unexplained = {"a city in Italy", "the UN met Raphael Sanzio", "we read Austen"}
    assert not unexplained & found.keys()


def test_a_sentence_whose_names_lie_in_several_splits_fits_none() -> None:
    by_split: dict[str, Name] = {}
    for number in range(100):
        by_split.setdefault(split_of(f"name:{number}"), Name("LOC", f"X{number}", f"name:{number}"))
    one, other = by_split["train"], by_split["test"]
    both = Sentence(f"from {one.text} to {other.text}", (one, other), "n:1", "example", 0)
    assert both.split is None and not entities.is_fit(both)
    assert both.mask == "from LOC to LOC"
    assert Sentence(f"all the way to {one.text}", (one, one), "n:1", "example", 0).split == "train"


def test_limits_hold_for_kind_name_and_mask() -> None:
    limits = Limits({"LOC": 100}, per_name=2, per_mask=3)
    name = Name("LOC", "Rome", "name:Rome")

    def take(text: str, who: Name = name) -> bool:
        return limits.take("LOC", Sentence(text, (who,), "n:1", "example", 0))

    assert [take(f"{n} roads lead to Rome") for n in ("many", "all", "some")] == [True, True, False]
    others = [Name("LOC", f"Oslo{n}", f"name:{n}") for n in range(8)]
    assert sum(take(f"we are in {who.text}", who) for who in others) == 3


def test_questions_that_ask_in_vain_have_no_reference() -> None:
    name = Name("ORG", "the UN", "name:UN")
    record = dict(reading.build([Sentence("they all joined the UN", (name,), "n:5", "example", 0)])[0])
    assert record["kind"] == "unanswerable" and record["references"] == [] and record["context"].endswith("the UN")
    place = Name("LOC", "Rome", "name:Rome")
    found = [
        Sentence(f"road number {'x' * n} leads to Rome", (place,), "n:3", "example", 0) for n in range(1, 9)
    ]  # fmt: skip
    answers = {reading.quota_of(sentence): sentence for sentence in found}
    assert answers.keys() <= {"place", "no person"} and "place" in answers


def test_definitions_that_give_their_label_away_are_left_out() -> None:
    def fit(gloss: str, category: str = "noun.plant", one_of: str = "") -> bool:
        return topics.is_fit(synset("n:1", category, "x", gloss=gloss, one_of=one_of))

    assert fit("a tall tree of the pine family with soft wood")
    assert not fit("a tall plant of the pine family with soft wood")
    assert not fit("a tall tree")
    assert not fit("a tall tree of the pine family with soft wood", category="noun.act")
    assert not fit("a tall tree of the pine family with soft wood", one_of="n:2")
