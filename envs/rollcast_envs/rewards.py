"""Rewards for text answers, as pure functions: an answer and its accepted references in, [0, 1] out.

Owns the measures; does not know tasks, episodes or costs of length. Every function takes the best over the references,
may be called from several threads, and keeps no text. Each equals its reference implementation:

- `exact_match`, `token_f1`: SQuAD's `evaluate-v2.0.py` (Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine
  Comprehension of Text"; Rajpurkar et al. 2018, "Know What You Don't Know: Unanswerable Questions for SQuAD"), bit
  for bit, and so with its limits: accents count, only ASCII punctuation is stripped, and text without spaces, such as
  Chinese, is one token. A task that should forgive a spelling lists it as a reference.
- `bleu`, `chrf`: sacrebleu (Post 2018, "A Call for Clarity in Reporting BLEU Scores"), over 100.
- `rouge`: rouge_score with its stemmer (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), F-measure.

Empty text: SQuAD rewards an empty answer where nothing else is right, so `exact_match` and `token_f1` are 1 there.
The other three measure overlap, and as in their references that of an empty text, even with another one, is 0.
`judged` turns any of them into a reward from people's verdicts; it alone is not in [0, 1].
A list without references is SQuAD's unanswerable question for the first two, and gives 0 for the others.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

from rouge_score.tokenize import tokenize
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from rollcast_envs.subsequence import lcs_length, lcs_positions

Tokenizer = Callable[[str], list[str]]

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
BLEU_ORDER = 4
STEM_LENGTH = 32
"""Characters of the longest word whose stem is remembered."""
MAX_TABLE = 12_000_000_000
"""ROUGE-L: tokens of the answer times those of the reference; a second or two."""
MAX_STEPS = 2_000_000
"""ROUGE-Lsum: steps of comparing lines with each other, see `_steps`; about a second."""


class TextTooLong(ValueError):
    """Answer and reference are so long that comparing them would hold up everything else."""


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer equals a normalised reference, else 0.

    >>> exact_match("The Netherlands.", ["netherlands", "Holland"])
    1.0
    """
    normalised = _normalise(answer)
    return float(any(normalised == _normalise(gold) for gold in _answerable(references)))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 over the normalised words that answer and reference share, counted with repetition.

    Where either is empty after normalisation, it is 1 if both are, else 0 (SQuAD v2).

    >>> round(token_f1("It is Addis Ababa", ["Addis Ababa"]), 3)
    0.667
    """
    words = _normalise(answer).split()
    return max(_token_f1(words, _normalise(gold).split()) for gold in _answerable(references))


def bleu(answer: str, references: Sequence[str]) -> float:
    """Sentence BLEU against the nearest reference: 13a tokens, up to 4-grams, exponential smoothing, effective order.

    Equals `sacrebleu.sentence_bleu(answer, [reference]).score / 100`, best over the references.

    >>> round(bleu("The cat sat on the mat.", ["The cat is on the mat."]), 3)
    0.489
    """
    words = words_13a(answer)
    grams = [_ngrams(words, n + 1) for n in range(BLEU_ORDER)]
    return max((_bleu(words, grams, words_13a(gold)) for gold in _listed(references)), default=0.0)


def chrf(answer: str, references: Sequence[str]) -> float:
    """chrF: F2 over the character 1- to 6-grams that answer and reference share, without white space.

    Equals `sacrebleu.sentence_chrf(answer, [reference]).score / 100`, best over the references. It needs no tokens, so
    it suits every language.

    >>> round(chrf("Das Licht ist an", ["Das Licht ist aus"]), 3)
    0.837
    """
    if not _listed(references):
        return 0.0
    return min(1.0, float(CHRF().sentence_score(answer, list(references)).score) / 100)


def rouge(
    answer: str, references: Sequence[str], kind: str = "rougeL", tokenizer: str | Tokenizer | None = None
) -> float:
    """ROUGE's F-measure: shared n-grams (`rouge1` to `rouge9`) or the longest common subsequence (`rougeL`).

    `rougeLsum` compares line by line, as rouge_score does: each reference line with all lines of the answer. Put one
    sentence on a line; it never splits sentences itself.

    rouge_score's own tokens, the default, are stemmed lower-case ASCII letters and digits: of a Russian or Chinese
    text nothing is left, and the score is 0. `tokenizer` is for those: "words" (runs of letters, marks and digits of
    any script), "characters" (the same one by one, for scripts without spaces), or a function from text to tokens.

    Raises `TextTooLong` where subsequences would take seconds: `rougeL` of two texts of more than 100,000 tokens,
    `rougeLsum` of two of 20,000 in one line each, or of two of several hundred long lines.

    >>> round(rouge("The cat sleeps on a mat", ["the cat slept on the mat"]), 3)
    0.667
    >>> rouge("Москва", ["Москва"]), rouge("Москва", ["Москва"], tokenizer="words")
    (0.0, 1.0)
    >>> round(rouge("東京都です", ["東京です"], "rouge1", "characters"), 3)
    0.889
    """
    tokens, references = _tokenizer(tokenizer), _listed(references)
    if kind == "rougeLsum":
        lines = _lines(tokens, answer)
        return max((_rouge_lsum(lines, _lines(tokens, gold)) for gold in references), default=0.0)
    words = tokens(answer)
    if kind == "rougeL":
        return max((_rouge_l(words, tokens(gold)) for gold in references), default=0.0)
    if re.fullmatch("rouge[1-9]", kind):
        return max((_rouge_n(words, tokens(gold), int(kind[-1])) for gold in references), default=0.0)
    raise ValueError(f"no ROUGE is called {kind!r}; pass rouge1 to rouge9, rougeL or rougeLsum")


def judged(
    answer: str, verdicts: Sequence[tuple[str, float]], measure: Callable[[str, Sequence[str]], float] = chrf
) -> float:
    """Likeness to the answer that was liked most, less likeness to the one disliked most: between -1 and 1.

    Each verdict is an answer that somebody judged and its value, from -1 (bad) to 1 (good). What is like neither is
    worth about 0, so where nothing was liked, any nonsense is worth as much: ask only what has a good answer.

    >>> verdicts = [("Lima", 1.0), ("I do not know.", -1.0)]
    >>> judged("Lima", verdicts, exact_match), judged("I do not know", verdicts, exact_match)
    (1.0, -1.0)
    >>> round(judged("Lima, I think", verdicts, token_f1), 2)
    0.21
    """
    liked = max((value * measure(answer, [text]) for text, value in verdicts if value > 0), default=0.0)
    disliked = max((-value * measure(answer, [text]) for text, value in verdicts if value < 0), default=0.0)
    return liked - disliked


def words_13a(text: str) -> list[str]:
    """BLEU's usual tokens, those of the WMT's mteval-v13a. sacrebleu's own keep 65,536 texts of any length in memory.

    >>> words_13a("Turn on 1,000 lights, please.")
    ['Turn', 'on', '1,000', 'lights', ',', 'please', '.']
    """
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, spaced in RULES_13A:
        text = pattern.sub(spaced, text)
    return text.split()


RULES_13A = [
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
]


def _listed(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str):
        raise TypeError(f"references is the str {references!r}; expected a list: pass [{references!r}]")
    return references


def _normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def _answerable(references: Sequence[str]) -> Sequence[str]:
    """The references that say something; if none does, the right answer is the empty one (SQuAD v2)."""
    return [gold for gold in _listed(references) if _normalise(gold)] or [""]


def _token_f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    return _f1((Counter(words) & Counter(gold)).total(), len(words), len(gold))


def _f1(shared: int, given: int, wanted: int) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is shared."""
    if not shared:
        return 0.0
    precision, recall = shared / given, shared / wanted
    return 2 * precision * recall / (precision + recall)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _bleu(words: list[str], grams: list[Counter[tuple[str, ...]]], gold: list[str]) -> float:
    """BLEU of the answer's words, whose n-grams are counted already, against one reference's."""
    correct = [(counts & _ngrams(gold, n + 1)).total() for n, counts in enumerate(grams)]
    total = [counts.total() for counts in grams]
    scored = BLEU.compute_bleu(correct, total, len(words), len(gold), smooth_method="exp", effective_order=True)
    # A perfect match is the exponential of a mean of logarithms: 100.00000000000004.
    return min(1.0, scored.score / 100)


def _rouge_n(words: list[str], gold: list[str], n: int) -> float:
    counts, wanted = _ngrams(words, n), _ngrams(gold, n)
    return _f1((counts & wanted).total(), counts.total(), wanted.total())


def _rouge_l(words: Sequence[str], gold: Sequence[str]) -> float:
    if len(words) * len(gold) > MAX_TABLE:
        raise _too_long("rougeL", f"{len(words):,} tokens against {len(gold):,}", f"{MAX_TABLE:,} pairs of them")
    return _f1(lcs_length(gold, words), len(words), len(gold))


def _rouge_lsum(lines: list[tuple[str, ...]], gold: list[tuple[str, ...]]) -> float:
    """Each reference line collects what it shares with any line of the answer; no token counts twice."""
    found = _shared_positions(lines, gold)
    shared = Counter(line[position] for line in gold for position in found[line])
    given = Counter(word for line in lines for word in line)
    return _f1((shared & given).total(), given.total(), sum(map(len, gold)))


def _lines(tokens: Tokenizer, text: str) -> list[tuple[str, ...]]:
    return [tuple(tokens(line)) for line in text.split("\n")]


def _shared_positions(lines: list[tuple[str, ...]], gold: list[tuple[str, ...]]) -> dict[tuple[str, ...], set[int]]:
    """For each reference line, the positions that lie in the common subsequence with some line of the answer."""
    distinct = list(dict.fromkeys(lines))
    found: dict[tuple[str, ...], set[int]] = {line: set() for line in gold}
    steps = len(found) * sum(len(line) + 4 for line in distinct) // 4
    for wanted, positions in found.items():
        known = set(wanted)
        sharing = (line for line in distinct if steps <= MAX_STEPS and not known.isdisjoint(line))
        patterns = {_pattern(line, known) for line in sharing}
        steps += sum(_steps(len(wanted), len(line)) for line in patterns)
        if steps > MAX_STEPS:
            sizes = [f"{len(text):,} lines with {sum(map(len, text)):,} tokens" for text in (lines, gold)]
            raise _too_long("rougeLsum", " against ".join(sizes), f"{MAX_STEPS:,} steps of comparing lines")
        for line in patterns:
            positions.update(lcs_positions(wanted, line))
    return found


def _pattern(line: tuple[str, ...], known: set[str]) -> tuple[str | None, ...]:
    """The line as a reference line sees it that knows only these words; others match nothing, and a run of them is one.

    Answer lines of one pattern are one line to the reference's.
    """
    seen = [word if word in known else None for word in line]
    return tuple(word for before, word in pairwise(["", *seen]) if word is not None or before is not None)


def _steps(wanted: int, given: int) -> int:
    """The work of comparing two lines of so many tokens, in steps of about half a microsecond."""
    return (wanted + given) * (1 + given // 4096) + wanted * given // 200


def _too_long(kind: str, sizes: str, limit: str) -> TextTooLong:
    return TextTooLong(
        f"rouge({kind=}): {sizes} is more than {limit}, which would take seconds; shorten the answer "
        "(`answer[:N]`), or use rouge2 or chrf, whose time grows with the length alone"
    )


def _tokenizer(tokenizer: str | Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        return lambda text: tokenize(text, Stemmer)
    if tokenizer == "words":
        return _unicode_words
    if tokenizer == "characters":
        return lambda text: list("".join(_unicode_words(text)))
    if callable(tokenizer):
        return tokenizer
    raise ValueError(f"no tokenizer is called {tokenizer!r}; pass 'words', 'characters', a function or None")


def _unicode_words(text: str) -> list[str]:
    """Lower-case runs of letters, marks and digits of any script, each composed (NFC)."""
    seen = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
    # Composing takes the square of a run of marks: hostile "words" stay as they are.
    return [unicodedata.normalize("NFC", word) if len(word) <= 100 else word for word in seen.split()]


class Stemmer:
    """rouge_score's stemmer, with a bounded memory."""

    @staticmethod
    def stem(word: str) -> str:
        return _short_stem(word) if len(word) <= STEM_LENGTH else _porter().stem(word)


@lru_cache(maxsize=1 << 15)
def _short_stem(word: str) -> str:
    return str(_porter().stem(word))


@cache
def _porter() -> Any:
    # nltk takes a second to import: only who asks for English ROUGE waits for it.
    from rouge_score import tokenizers

    return tokenizers.porter.PorterStemmer()
