"""Figures over many answers: sacrebleu's corpus scores and signatures, F1 of labels and entities by hand."""

import doctest
import random

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from rollcast_envs import corpus
from rollcast_envs.corpus import corpus_bleu, corpus_chrf, entity_f1, macro_f1

WORDS = ["The", "cat,", "sat;", "on", "1,000", "mats.", "東京", "&amp;", "-\n", "don't"]


def sentences(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("counts", [(1, 1), (3, 3), (1, 4)])
def test_corpus_scores_and_signatures_are_sacrebleus(counts: tuple[int, int]) -> None:
    rng = random.Random(1)
    for _ in range(50):
        answers = sentences(rng, 20)
        references = [sentences(rng, rng.randint(*counts)) for _ in answers]
        streams = [[row[index] if index < len(row) else None for row in references] for index in range(counts[1])]
        streams = [stream for stream in streams if any(stream)]
        for score, metric in ((corpus_bleu, sacrebleu.BLEU()), (corpus_chrf, sacrebleu.CHRF())):
            value, signature = score(answers, references)
            assert value == pytest.approx(metric.corpus_score(answers, streams).score / 100, abs=1e-12)
            assert 0 < value < 1 and signature == metric.get_signature().format()


def test_the_signature_says_how_many_references_there_were() -> None:
    assert corpus_bleu(["a b", "c"], [["a b"], ["c"]])[1].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert corpus_chrf(["a b", "c"], [["a b"], ["c", "d"]])[1].startswith("nrefs:var|case:mixed|eff:yes|nc:6|nw:0|")


@pytest.mark.parametrize("score", [corpus_bleu, corpus_chrf])
def test_empty_answers_score_nothing_and_empty_corpora_are_refused(score: object) -> None:
    assert callable(score)
    assert score([""], [["a"]])[0] == score([""], [[""]])[0] == 0.0
    with pytest.raises(ValueError, match="pass one answer or more"):
        score([], [])
    with pytest.raises(ValueError, match="2 answers against 1"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"references\[1\] is \[\]"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"references\[0\] is 'a'"):
        score(["a"], ["a"])


def test_macro_f1_by_hand() -> None:
    gold = ["joy", "joy", "joy", "fear", "fear", "anger"]
    said = ["joy", "joy", "fear", "fear", None, "sorrow"]
    # joy: 2 of 2 said, 2 of 3 found, 4/5; fear: 1 of 2 said, 1 of 2 found, 1/2; anger: 0; sorrow is no gold label.
    assert macro_f1(zip(said, gold, strict=True)) == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)
    assert macro_f1(zip(gold, gold, strict=True)) == 1.0
    with pytest.raises(ValueError, match="pass one pair"):
        macro_f1([])


@given(st.lists(st.tuples(st.sampled_from("abcdx"), st.sampled_from("abcd")), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_of_precision_and_recall_in_harmony(pairs: list[tuple[str, str]]) -> None:
    scores = []
    for label in {gold for _, gold in pairs}:
        right = sum(pair == (label, label) for pair in pairs)
        precision = right / max(1, sum(predicted == label for predicted, _ in pairs))
        recall = right / sum(gold == label for _, gold in pairs)
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert macro_f1(pairs) == pytest.approx(sum(scores) / len(scores))


def test_entities_count_whole_with_their_type_over_all_texts() -> None:
    gold = [{("PER", "Ada Lovelace"), ("LOC", "Rome")}, {("ORG", "UN")}, set()]
    said = [{("PER", "Ada"), ("LOC", "Rome")}, {("ORG", "UN"), ("LOC", "UN")}, {("PER", "Nobody")}]
    # 2 of 5 said are right, 2 of 3 are found.
    assert entity_f1(said, gold) == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))
    assert entity_f1(gold, gold) == 1.0
    assert entity_f1([set()], [set()]) == entity_f1([], []) == entity_f1([set()], gold[:1]) == 0.0
    with pytest.raises(ValueError, match="1 answers against 3"):
        entity_f1([set()], gold)


def test_the_examples_in_the_documentation_are_true() -> None:
    results = doctest.testmod(corpus)
    assert results.attempted > 0 and results.failed == 0
