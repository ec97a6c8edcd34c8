"""Builds `records.jsonl` from the sentences of WordNet that name exactly one person, place or organisation.

    python -m rollcast_envs.data.reading.build [wordnet-base.deb]

Owns the choice of sentences and the wording of the questions; `rollcast_envs.data.entities.sentences` owns what is a
name. The same package always gives the same bytes. What is left out, and why, is told in SOURCE.md.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rollcast_envs.data.building import Record, to_lines, without_leaks
from rollcast_envs.data.entities.sentences import Limits, Sentence, sentences
from rollcast_envs.data.wordnet import wordnet
from rollcast_envs.splits import position, split_of

HERE = Path(__file__).parent
QUESTIONS = {
    "place": (
        "Which place is named?",
        "What place does the text mention?",
        "Name the place that occurs in the text.",
        "Which city, country, river or other place is mentioned?",
    ),
    "person": (
        "Which person is named?",
        "Who is named in the text?",
        "Name the person who occurs in the text.",
        "What is the name of the person mentioned?",
    ),
}
ASKS = {"LOC": "place", "PER": "person"}
QUOTAS = {"place": 850, "person": 650, "no place": 250, "no person": 250}
"""How many questions at most: on a place or person that is named, and on one that is not."""
IN_VAIN = 4
"""One sentence in so many is asked for what it does not name."""
PER_NAME = 12
PER_MASK = 2
WORDS = range(4, 41)


def main() -> None:
    records = build(sentences(wordnet()))
    (HERE / "records.jsonl").write_text(to_lines(records), encoding="utf-8", newline="\n")
    print(f"{len(records)} records, {Counter((r['kind'], split_of(r['group'])) for r in records)}")


def build(found: Iterable[Sentence]) -> list[Record]:
    """The records, sorted by id."""
    limits = Limits(QUOTAS, PER_NAME, PER_MASK)
    fit = [sentence for sentence in found if len(sentence.names) == 1 and len(sentence.text.split()) in WORDS]
    chosen = [sentence for sentence in sorted(fit, key=_order) if limits.take(quota_of(sentence), sentence)]
    return without_leaks([_record(sentence) for sentence in chosen], lambda record: record["context"])


def quota_of(sentence: Sentence) -> str:
    """What is asked for: mostly what is named, sometimes what is not. The lot is the sentence's own, by its hash."""
    named = ASKS.get(sentence.names[0].type)
    lot = _order(sentence)
    if named and lot % IN_VAIN:
        return named
    others = [asked for asked in QUESTIONS if asked != named]
    return f"no {others[lot // IN_VAIN % len(others)]}"


def _order(sentence: Sentence) -> int:
    return position(sentence.id)


def _record(sentence: Sentence) -> Record:
    quota = quota_of(sentence)
    asked, answerable = quota.removeprefix("no "), not quota.startswith("no ")
    wordings = QUESTIONS[asked]
    return {
        "id": f"reading:{sentence.id}",
        "kind": asked if answerable else "unanswerable",
        "context": sentence.text,
        "question": wordings[position(f"wording:{sentence.id}") % len(wordings)],
        "references": [sentence.names[0].text] if answerable else [],
        "group": sentence.group,
        "source": f"wordnet/{sentence.source}",
    }


if __name__ == "__main__":
    main()
