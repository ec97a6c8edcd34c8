"""Samples token by token: what each token earned and which way the step pushed it, for a terminal and as a page.

Owns: lining up what was sampled with what the learner made of it, and the form for a terminal (`token_page.py` has the
page). Does not know where records lie or how a tokenizer works: it is handed a function from token ids to text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from rollcast.display import harmless, table

Record = dict[str, Any]
TextOf = Callable[[Sequence[int]], str]

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for bytes that are no character, or not yet."""
UNFINISHED = "⋯"
LONGEST_CHARACTER = 4
"""Bytes of a character at most, so tokens too."""


@dataclass(frozen=True)
class SeenToken:
    """One sampled token. Records -> terminal and page."""

    text: str
    """`UNFINISHED` for a token whose bytes only begin a character: the one that ends it has the whole of it."""
    version: int
    sampled: float
    """Log-probability under the policy that sampled it."""
    policy: float
    """Log-probability under the policy that was being improved."""
    value: float
    advantage: float
    push: float
    """How hard the loss pulled the log-probability: up where positive."""

    @property
    def ratio(self) -> float:
        return math.exp(min(self.policy - self.sampled, 20.0))

    @property
    def left_out(self) -> bool:
        """Whether a clip or a mask kept the token from teaching what its advantage says."""
        return self.push == 0.0 and self.advantage != 0.0


@dataclass(frozen=True)
class Sample:
    """One episode: a text that stands between sampled tokens, or a token, in order. Records -> terminal and page."""

    name: str
    group: str
    """The samples of one prompt have it in common."""
    reward: float
    metrics: dict[str, float]
    references: tuple[str, ...]
    cut_off: bool
    """Whether the last answer ran into the longest that it may be."""
    parts: tuple[str | SeenToken, ...]

    @property
    def tokens(self) -> list[SeenToken]:
        return [part for part in self.parts if isinstance(part, SeenToken)]

    @property
    def asked(self) -> str:
        """What stands before the first token."""
        return self.parts[0] if self.parts and isinstance(self.parts[0], str) else ""

    @property
    def versions(self) -> list[int]:
        """Of the policies that sampled it, in order."""
        return list(dict.fromkeys(token.version for token in self.tokens))

    def told(self) -> str:
        """The sample in a line, after its name."""
        tokens = self.tokens
        pushed = (sum(token.push > 0 for token in tokens), sum(token.push < 0 for token in tokens))
        parts = [f"reward {self.reward:.3f}", *(f"{name} {value:.3g}" for name, value in self.metrics.items())]
        parts += [f"{len(tokens)} tokens ({pushed[0]} up, {pushed[1]} down)"]
        parts += [f"policy version {' '.join(map(str, self.versions))}"] if tokens else []
        return " · ".join([*parts, "cut off: too long"] if self.cut_off else parts)


def samples_of(records: Sequence[Record], text_of: TextOf) -> list[Sample]:
    """Records of `rollouts/step_N.jsonl` that carry `learned`."""
    return [
        Sample(
            record["prompt"],
            record["group"],
            record["reward"],
            record["metrics"],
            tuple(record["references"]),
            bool(record["turns"]) and record["turns"][-1]["finish_reason"] == "length",
            tuple(_parts(record, text_of)),
        )
        for record in records
    ]


def _parts(record: Record, text_of: TextOf) -> Iterator[str | SeenToken]:
    learned = record["learned"]
    columns = iter(zip(learned["logprobs"], learned["values"], learned["advantages"], learned["push"], strict=True))
    for stream in record["streams"]:
        version_at = {place: version for version, start, end in stream["spans"] for place in range(start, end)}
        between: list[int] = []
        begun: list[int] = []
        for place, (token, trained) in enumerate(zip(stream["token_ids"], stream["trained"], strict=True)):
            if not trained:
                between.append(token)
                begun = []
                continue
            if between:
                yield text_of(between)
                between = []
            begun.append(token)
            text = text_of(begun)
            if text.endswith(BROKEN) and len(begun) < LONGEST_CHARACTER:
                text = UNFINISHED
            else:
                begun = []
            yield SeenToken(text, version_at[place], stream["logprobs"][place], *next(columns))
        if between:
            yield text_of(between)


# ---- on a terminal


EXPLAINED = (
    "sampled, policy: probability in % under the policy that sampled the token, and under the one being improved; "
    "ratio: the second over the first.\n"
    "value: what the critic expected before the token; advantage: how much better it went, normalised.\n"
    "push: how hard the loss pulled the token's log-probability, up or down (before division by the step's tokens); "
    "'left out': a clip or a mask kept it from teaching."
)
NUMBERS = ("sampled", "policy", "ratio", "value", "advantage", "push")


def show(samples: Sequence[Sample], step: int, console: Console) -> None:
    """What was said and, in a table, what was sampled upon it; the policy's version where a sample has several."""
    largest = largest_push(samples)
    for sample in samples:
        console.print(f"step {step}, sample {sample.name}: {sample.told()}", style="bold")
        several = len(sample.versions) > 1
        for is_text, parts in groupby(sample.parts, key=lambda part: isinstance(part, str)):
            if is_text:
                console.print(*(_short(str(part), 2 * console.width) for part in parts))
                continue
            rows = table(console, "token", *["version"] * several, *NUMBERS, "", right=NUMBERS)
            for token in (part for part in parts if isinstance(part, SeenToken)):
                version = [str(token.version)] * several
                rows.add_row(_spelt(token.text), *version, *numbers(token), _bar(token, largest))
            console.print(rows)
    console.print(EXPLAINED)


def numbers(token: SeenToken) -> tuple[str, ...]:
    """What `NUMBERS` names, as text."""
    push = "left out" if token.left_out else f"{token.push:+.3f}"
    probabilities = (percent(token.sampled), percent(token.policy))
    return (*probabilities, f"{token.ratio:.3f}", f"{token.value:.3f}", f"{token.advantage:+.3f}", push)


def percent(logprob: float) -> str:
    """A log-probability as a share of a hundred, to three digits."""
    share = 100.0 * math.exp(min(logprob, 0.0))
    return f"{share:.1f}" if share >= 0.1 else f"{share:.1g}"


def largest_push(samples: Sequence[Sample]) -> float:
    """Where colours and bars end: all but the strongest 2 % of pushes are weaker, so that no single one pales them."""
    pushes = sorted(abs(token.push) for sample in samples for token in sample.tokens if token.push)
    return pushes[int(0.98 * (len(pushes) - 1))] if pushes else 0.0


def _bar(token: SeenToken, largest: float) -> Text:
    length = min(8, round(8 * abs(token.push) / largest)) if largest else 0
    return Text("▲" * length, style="green") if token.push > 0 else Text("▼" * length, style="red")


def _spelt(text: str) -> Text:
    """A token with blanks that can be seen."""
    shown = harmless(text)
    return Text(shown.plain.replace(" ", "·"))


def _short(text: str, most: int) -> Text:
    """What stands between answers, its end foremost: there the question is."""
    shown = harmless(text)
    if len(shown) > most:
        shown = Text("…").append_text(shown[len(shown) - most :])
    shown.stylize("dim")
    return shown
