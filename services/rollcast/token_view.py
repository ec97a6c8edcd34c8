"""Samples token by token: what each token earned and which way the step pushed it, for a terminal and as a page.

Owns: lining up what was sampled with what the learner made of it, and both forms of showing it. Does not know where
records lie or how a tokenizer works: it is handed a function from token id to text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Console
from rich.text import Text

from rollcast.display import harmless, table

Record = dict[str, Any]


@dataclass(frozen=True)
class SeenToken:
    """One sampled token. Records -> terminal and page."""

    text: str
    version: int
    sampled: float
    """Log-probability under the policy that sampled it."""
    policy: float
    """Log-probability under the policy that was being improved."""
    value: float
    advantage: float
    push: float
    """Up where positive."""

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
    reward: float
    parts: tuple[str | SeenToken, ...]

    @property
    def tokens(self) -> list[SeenToken]:
        return [part for part in self.parts if isinstance(part, SeenToken)]


def samples_of(records: Sequence[Record], text_of: Callable[[int], str]) -> list[Sample]:
    """Records of `rollouts/step_N.jsonl` that carry `learned`."""
    return [Sample(record["prompt"], record["reward"], tuple(_parts(record, text_of))) for record in records]


def _parts(record: Record, text_of: Callable[[int], str]) -> Iterator[str | SeenToken]:
    learned = record["learned"]
    columns = iter(zip(learned["logprobs"], learned["values"], learned["advantages"], learned["push"], strict=True))
    for stream in record["streams"]:
        version_at = {place: version for version, start, end in stream["spans"] for place in range(start, end)}
        between = ""
        for place, (token, trained) in enumerate(zip(stream["token_ids"], stream["trained"], strict=True)):
            if not trained:
                between += text_of(token)
                continue
            if between:
                yield between
                between = ""
            yield SeenToken(text_of(token), version_at[place], stream["logprobs"][place], *next(columns))
        if between:
            yield between


# ---- on a terminal


def show(samples: Sequence[Sample], step: int, console: Console) -> None:
    """A table a sample. Probabilities are told as logarithms, as the learner knows them."""
    right = ("sampled", "policy", "ratio", "value", "advantage", "push")
    for sample in samples:
        console.print(f"step {step}, sample {sample.name}: reward {sample.reward:.3f}", style="bold")
        largest = _largest(sample)
        rows = table(console, "token", "version", *right, "", right=right)
        for part in sample.parts:
            if isinstance(part, str):
                rows.add_row(_short(part), "", "", "", "", "", "", "", "")
            else:
                rows.add_row(harmless(part.text), str(part.version), *_numbers(part), _bar(part, largest))
        console.print(rows)
    console.print(
        "sampled, policy: log-probability under the policy that sampled the token, and under the one being improved.\n"
        "push: how the step moved the token's log-probability, up or down; - where a clip or a mask left it out."
    )


def _numbers(token: SeenToken) -> tuple[str, ...]:
    push = "-" if token.left_out else f"{token.push:+.3f}"
    values = (token.sampled, token.policy, token.ratio, token.value)
    return (*(f"{value:.3f}" for value in values), f"{token.advantage:+.3f}", push)


def _bar(token: SeenToken, largest: float) -> Text:
    length = round(8 * abs(token.push) / largest) if largest else 0
    return Text("▲" * length, style="green") if token.push > 0 else Text("▼" * length, style="red")


def _short(text: str, most: int = 72) -> Text:
    """What stands between answers, its end foremost: there the question is."""
    shown = harmless(text)
    if len(shown) > most:
        shown = Text("…").append_text(shown[len(shown) - most :])
    shown.stylize("dim")
    return shown


def _largest(sample: Sample) -> float:
    return max((abs(token.push) for token in sample.tokens), default=0.0)


# ---- as a page

STYLE = """
:root { color-scheme: light dark; font: 15px/1.6 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  border: 1px solid #8884; border-radius: .5rem; padding: .75rem; }
.text i { opacity: .55; font-style: normal; } .text b { font-weight: normal; border-radius: .2rem; }
.text b.out { text-decoration: underline dotted; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: .5rem; }
th, td { text-align: right; padding: .1rem .6rem; border-bottom: 1px solid #8883; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; white-space: pre; }
summary { cursor: pointer; opacity: .7; } .key b { padding: 0 .3rem; border-radius: .2rem; font-weight: normal; }
"""
UP, DOWN = "34, 160, 90", "214, 60, 60"
HEADINGS = ("token", "version", "sampled", "policy", "ratio", "value", "advantage", "push")
EXPLAINED = (
    f'Each sampled token is coloured by what the step did to it: <b style="background: rgba({UP}, .5)">pushed up</b>, '
    f'<b style="background: rgba({DOWN}, .5)">pushed down</b>, or <b style="text-decoration: underline dotted">left '
    "out</b> by a clip or a mask. Point at one for its numbers: <i>sampled</i> and <i>policy</i> are log-probabilities "
    "under the policy that sampled it and under the one being improved."
)


def to_page(samples: Sequence[Sample], step: int, run: str) -> str:
    """A page that stands alone: no script, nothing fetched."""
    body = "".join(_section(sample) for sample in samples)
    title = f"{escape(run)}, step {step}: token by token"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'</head><body><h1>{title}</h1><p class="key">{EXPLAINED}</p>{body}</body></html>\n'
    )


def _section(sample: Sample) -> str:
    largest = _largest(sample)
    text = "".join(_span(part, largest) for part in sample.parts)
    head = "".join(f"<th>{name}</th>" for name in HEADINGS)
    rows = "".join(_row(token) for token in sample.tokens)
    return (
        f'<section><h2>Sample {escape(sample.name)}: reward {sample.reward:.3f}</h2><div class="text">{text}</div>'
        f"<details><summary>the numbers</summary><table><tr>{head}</tr>{rows}</table></details></section>"
    )


def _span(part: str | SeenToken, largest: float) -> str:
    if isinstance(part, str):
        return f"<i>{escape(part)}</i>"
    told = ", ".join(f"{name} {value}" for name, value in zip(HEADINGS[2:], _numbers(part), strict=True))
    shade = 0.75 * abs(part.push) / largest if largest else 0.0
    colour = f"background: rgba({UP if part.push > 0 else DOWN}, {shade:.2f})"
    out = ' class="out"' if part.left_out else ""
    return f'<b{out} style="{colour}" title="version {part.version}, {told}">{escape(part.text)}</b>'


def _row(token: SeenToken) -> str:
    cells = (escape(token.text), str(token.version), *_numbers(token))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
