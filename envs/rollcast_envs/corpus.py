"""Figures over many answers at once, for evaluation: corpus BLEU and chrF, macro F1 of labels, F1 of entities.

Owns the sums over answers; does not know tasks, nor how an answer becomes a label or entities. A mean of sentence
scores is not a corpus score: these pool the counts first, as published figures do. All are in [0, 1].
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import zip_longest
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from rollcast_envs.rewards import words_13a


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """BLEU of all answers, over 100, and sacrebleu's signature, which belongs beside every published figure.

    `references` has a list of one or more for each answer; their number may vary. Raises ValueError where there is
    nothing to compare.

    >>> corpus_bleu(["The cat sat on the mat."], [["The cat sat on the mat.", "A cat sat on the mat."]])
    (1.0, 'nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0')
    """
    metric = BLEU(force=True)
    metric.tokenizer = lambda text: " ".join(words_13a(text))
    return _pooled(metric, answers, references)


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """chrF of all answers, over 100, and sacrebleu's signature. References and errors as for `corpus_bleu`.

    >>> corpus_chrf(["Licht an"], [["Licht an"]])
    (1.0, 'nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0')
    """
    return _pooled(CHRF(), answers, references)


def macro_f1(pairs: Iterable[tuple[Hashable, Hashable]]) -> float:
    """Mean F1 of the gold labels in pairs of (predicted, gold); each label counts the same, however rare.

    Equals `sklearn.metrics.f1_score(gold, predicted, average="macro", labels=sorted(set(gold)), zero_division=0)`. A
    prediction that is no gold label (None, say, for an answer without a label) is an error, not a class of its own.
    Raises ValueError without pairs.

    >>> macro_f1([("joy", "joy"), ("joy", "fear"), ("fear", "fear"), ("fear", "fear")])
    0.7333333333333334
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("macro F1 of no answers is undefined; pass one pair of (predicted, gold) or more")
    right = Counter(gold for predicted, gold in pairs if predicted == gold)
    said, wanted = Counter(predicted for predicted, _ in pairs), Counter(gold for _, gold in pairs)
    return sum(_f1(right[label], said[label], wanted[label]) for label in wanted) / len(wanted)


def entity_f1(predicted: Sequence[AbstractSet[Hashable]], gold: Sequence[AbstractSet[Hashable]]) -> float:
    """F1 over the entities of all texts together (micro-averaged), as at CoNLL; one set of (type, text) for each text.

    An entity counts only whole, with its type. 0 where nothing is found, even if there is nothing to find, as in
    conlleval. Raises ValueError where the lengths differ.

    >>> entity_f1([{("PER", "Ada"), ("LOC", "Rome")}, set()], [{("PER", "Ada"), ("ORG", "Rome")}, {("LOC", "Oslo")}])
    0.4
    """
    _same_length(predicted, gold)
    shared = sum(len(said & wanted) for said, wanted in zip(predicted, gold, strict=True))
    return _f1(shared, sum(map(len, predicted)), sum(map(len, gold)))


def _pooled(metric: Any, answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    _same_length(answers, references)
    if not answers:
        raise ValueError("a corpus score of no answers is undefined; pass one answer or more")
    for index, accepted in enumerate(references):
        if isinstance(accepted, str) or not accepted:
            raise ValueError(f"references[{index}] is {accepted!r}; pass a list of one reference or more")
    # sacrebleu wants streams: everyone's first reference, everyone's second, None where there is none.
    streams = [list(stream) for stream in zip_longest(*references)]
    score = metric.corpus_score(list(answers), streams).score / 100
    return min(1.0, score), metric.get_signature().format()


def _same_length(given: Sequence[object], wanted: Sequence[object]) -> None:
    if len(given) != len(wanted):
        raise ValueError(f"{len(given)} answers against {len(wanted)}; pass one for each, in the same order")


def _f1(shared: int, given: int, wanted: int) -> float:
    return 2 * shared / (given + wanted) if shared else 0.0
