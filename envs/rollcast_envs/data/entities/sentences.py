"""Sentences of WordNet in which every name is known, and what each name is: a person, a place or an organisation.

Owns: what WordNet's words are names of, and the search for names in a sentence. Does not know what is asked about the
sentences, nor which of them a data set takes. Nobody read these labels one by one: they follow from WordNet's
taxonomy, and a sentence counts only if its capital letters leave nothing unexplained.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from rollcast_envs.data.wordnet import Synset
from rollcast_envs.splits import SPLITS, split_of

ORGANIZATION = "n:08008335"
EMPIRE = "n:08557482"
UNIVERSITY = "n:04511002"
PERSONS = {"noun.person"}
PLACES = {"noun.location", "noun.object"}
NO_RIVALS = {"noun.group", "noun.act", "noun.plant", "noun.animal"}
"""Other readings of a name that do not make it ambiguous: nations as a group, a battle, a genus."""

COMMON_WORDS_TOO = {"China", "Turkey", "Japan", "Jordan", "Chile", "Guinea", "Java", "Hitler", "Stalin", "Mali"}
"""Names that are taken although a common word is spelled like them."""
NOT_NAMES = {
    "Man", "Pope", "Savior", "Redeemer", "Almighty", "Providence", "Old World", "New World", "Occident", "Orient",
    "Allies", "Axis", "Soviets", "Karaites", "Methodists", "Mormons", "Quakers", "Shakers", "Baptists", "Dunkers",
    "Dippers", "Cathars", "Eelam", "Carthage", "Sabaoth", "Kokka", "Kokka Shinto", "Shua", "Shuha Shinto",
    "Sunni Islam", "Shiah Islam", "Eastern Orthodox", "Holy Roman Empire", "Nazi Germany", "Third Reich",
    "Second Reich", "SS", "SA", "Roman Legion", "Lewis and Clark Expedition", "Fahrenheit", "Celsius", "Purkinje",
    "Lorentz", "Madonna", "Big Dipper", "Northern Cross", "Southern Cross", "Milky Way", "Milky Way Galaxy",
}  # fmt: skip
"""What WordNet's taxonomy makes a name of a person, place or organisation, and a reader would not."""
PARTICLES = {"von", "van", "de", "du", "der", "della", "la", "le"}
"""Words before a name that are part of a longer, unknown one."""
SHORT_NAMES = {"UN", "EU", "US", "UK"}
"""Others of two letters are more often something else: OH is a molecule before it is Ohio."""
LOWER_IN_NAMES = {"of", "and", "the", "for", "in", "on", "to", "de", "del", "la", "le", "van", "von", "der", "al", "as"}

SHARES = {"train": 80, "validation": 10, "test": 10}
"""Per cent of a quota. The most frequent names happen to lie in train: without shares, test would lack places."""

WORD = re.compile(r"(?<!\w)(?<!\w['’.-])[^\W_][\w'’.-]*")
"""A word with the marks inside of it: "Saint-Denis", "U.S.", "O'Neill"."""


@dataclass(frozen=True)
class Name:
    """A name that stands in a sentence."""

    type: str
    """PER, LOC or ORG."""
    text: str
    key: str
    """The same for all names of one person, place or organisation: what sentences are split by."""


@dataclass(frozen=True)
class Sentence:
    """A sentence or phrase and all names in it, in order. -> build scripts."""

    text: str
    names: tuple[Name, ...]
    source: str
    """The synset that it explains, such as `n:02084071`."""
    form: str
    """`example` or `definition`."""
    others: int
    """How many of its words are capitalised and no names, such as "French"."""

    @property
    def split(self) -> str | None:
        """The split of all its names; None where they lie in several, so that the sentence fits none."""
        splits = {split_of(name.key) for name in self.names} or {split_of(self.group)}
        return splits.pop() if len(splits) == 1 else None

    @property
    def id(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    @property
    def group(self) -> str:
        return self.names[0].key if self.names else f"text:{self.id}"

    @property
    def mask(self) -> str:
        """The sentence with types in the place of names: many definitions differ in the name only."""
        masked = self.text
        for name in self.names:
            masked = masked.replace(name.text, name.type)
        return masked


class Limits:
    """How often the same may be taken: of one kind in a split, of one name, of one mask."""

    def __init__(self, quotas: Mapping[str, int], per_name: int, per_mask: int) -> None:
        shares = [(kind, split, limit * SHARES[split] // 100) for kind, limit in quotas.items() for split in SPLITS]
        self._left: dict[tuple[str, str], int] = {("quota", f"{split} {kind}"): share for kind, split, share in shares}
        self._per = {"name": per_name, "mask": per_mask}

    def take(self, kind: str, sentence: Sentence) -> bool:
        """True, and counted, if none of the limits that apply to the sentence is reached yet."""
        keys = [
            ("quota", f"{sentence.split} {kind}"),
            ("mask", sentence.mask),
            *{("name", name.key) for name in sentence.names},
        ]
        left = [self._left.setdefault(key, self._per.get(key[0], 0)) for key in keys]
        if min(left) > 0:
            self._left.update({key: self._left[key] - 1 for key in keys})
        return min(left) > 0


def sentences(synsets: Sequence[Synset]) -> Iterator[Sentence]:
    """All sentences and phrases whose capitalised words are names of one known type, or known not to be names."""
    names = names_of(synsets)
    by_first_word = defaultdict(list)
    for name in sorted(names, key=len, reverse=True):
        by_first_word[name.split()[0]].append(name)
    others = other_capitals(synsets)
    seen: set[str] = set()
    for synset in synsets:
        for form, texts in (("example", synset.examples), ("definition", (synset.definition,))):
            for text in texts:
                found = read(text, by_first_word, others)
                if found is not None and text not in seen and not text.startswith("-") and "--" not in text:
                    seen.add(text)
                    yield Sentence(text, tuple(names[name] for name in found[0]), synset.id, form, found[1])


def read(text: str, by_first_word: Mapping[str, Sequence[str]], others: set[str]) -> tuple[list[str], int] | None:
    """The names in a text, and how many other words are capitalised; None where one of them cannot be explained.

    Two capitalised words side by side that are not one known name may be an unknown one, so they cannot be explained.
    """
    found: list[str] = []
    other = end = 0
    last_capital = -2
    before = ""
    for word in WORD.finditer(text):
        start, previous, before = word.start(), before, word[0]
        if start < end or not any(letter.isupper() for letter in word[0]):
            continue
        name = next((name for name in by_first_word.get(_bare(word[0]), ()) if _stands_at(name, text, start)), None)
        explained = _bare(word[0]) in others or (not found and not other and _lowered(word[0], start) in others)
        beside_another = start - last_capital == 1 and (name or found)
        if not (name or explained) or beside_another or (name and previous in PARTICLES):
            return None
        found += [name] if name else []
        other += not name
        end = start + len(name or word[0])
        last_capital = end
    return found, other


def _bare(word: str) -> str:
    """The word without what surrounds it in a sentence.

    >>> _bare("Lincoln's"), _bare("Peru."), _bare("U.S.")
    ('Lincoln', 'Peru', 'U.S.')
    """
    word = re.sub(r"['’]s?$", "", word)
    return word if re.fullmatch(r"(\w\.)+", word) else word.rstrip(".'’-")


def _lowered(word: str, start: int) -> str:
    """The first word of a sentence as it is written elsewhere."""
    return _bare(word).lower() if start <= 1 else ""


def _stands_at(name: str, text: str, start: int) -> bool:
    return text.startswith(name, start) and re.match(r"\w|[-.]\w", text[start + len(name) :]) is None


def names_of(synsets: Sequence[Synset]) -> dict[str, Name]:
    """The names that are of one type in all their readings."""
    ancestors = _ancestors_of(synsets)
    words = {word for synset in synsets for word in synset.words}
    adjectives = {word for synset in synsets if synset.id[0] in "as" for word in synset.words}
    types: dict[str, set[str]] = defaultdict(set)
    meanings: list[list[str]] = []
    for synset in synsets:
        kind = type_of(synset, ancestors(synset.id))
        named = [word for word in synset.words if word[0].isupper() and synset.id.startswith("n:")]
        meanings += [named] if kind else []
        for word in named:
            if kind or synset.category not in NO_RIVALS:
                types[word].add(kind or synset.category)
    keys = _keys(meanings)
    chosen = {word: next(iter(kinds)) for word, kinds in types.items() if len(kinds) == 1}
    return {
        word: Name(kind, word, keys[word])
        for word, kind in chosen.items()
        if kind in ("PER", "LOC", "ORG") and is_name(word, words) and word not in adjectives
    }


def type_of(synset: Synset, ancestors: frozenset[str]) -> str | None:
    """PER, LOC or ORG; None for what is none of them, or is no single thing."""
    if ORGANIZATION in ancestors or (synset.instance_of and UNIVERSITY in ancestors):
        return None if EMPIRE in ancestors else "ORG"
    if synset.instance_of and synset.category in PERSONS:
        return "PER"
    return "LOC" if synset.instance_of and synset.category in PLACES else None


def is_name(word: str, words: set[str]) -> bool:
    """False for what may be a common word that is capitalised for another reason, such as Labor, King or West."""
    if word in NOT_NAMES or (len(word) < 3 and word not in SHORT_NAMES):
        return False
    if " " not in word:
        return word in COMMON_WORDS_TOO or word.lower() not in words
    return all(part[0].isupper() or not part[0].isalpha() or part in LOWER_IN_NAMES for part in word.split())


def other_capitals(synsets: Iterable[Synset]) -> set[str]:
    """Capitalised words that are no names here (French, Monday, I), and all words that occur in lower case."""
    adjectives_and_days = [s for s in synsets if s.id[0] != "n" or s.category == "noun.time"]
    listed = {word for synset in adjectives_and_days for word in synset.words if " " not in word}
    texts = (text for synset in synsets for text in (synset.definition, *synset.examples))
    lower = {_bare(word) for text in texts for word in WORD.findall(text) if word == word.lower()}
    named = [synset for synset in synsets if synset.instance_of and synset.category in PERSONS | PLACES]
    places = {word for synset in named if synset.category in PLACES for word in synset.words}
    like_a_name = {word.lower() for synset in named for word in synset.words}
    return (listed - places) | (lower - like_a_name) | {"I", "I'm", "I've", "I'll", "I'd"}


def _ancestors_of(synsets: Iterable[Synset]) -> Callable[[str], frozenset[str]]:
    by_id = {synset.id: synset for synset in synsets}

    @cache
    def ancestors(identifier: str) -> frozenset[str]:
        synset = by_id[identifier]
        above = [ancestors(other) for other in (*synset.kinds, *synset.instance_of)]
        return frozenset({identifier}).union(*above)

    return ancestors


def _keys(meanings: Iterable[Sequence[str]]) -> dict[str, str]:
    """One key for all words that share a meaning, directly or through others."""
    above: dict[str, str] = {}

    def top(word: str) -> str:
        while above.setdefault(word, word) != word:
            word = above[word]
        return word

    for words in meanings:
        for word in words:
            one, other = sorted((top(words[0]), top(word)))
            above[other] = one
    return {word: f"name:{top(word)}" for word in above}
