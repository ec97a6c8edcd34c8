"""Samples token by token as a page for the browser: one file without scripts, and nothing is fetched.

Owns: what the page looks like. Does not know where its numbers come from (`token_view.py`).
"""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from rollcast.token_view import NUMBERS, Sample, SeenToken, largest_push, numbers

SHADES = 8
"""Steps of a colour, from just visible to full."""
UP, DOWN = "38 120 220", "226 92 30"
"""Blue and orange: told apart by all eyes, on white and on black."""
STYLE = """
:root { color-scheme: light dark; font: 15px/1.6 system-ui, sans-serif; }
body { max-width: 64rem; margin: 2rem auto 6rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin-bottom: .3rem; } h2 { font-size: 1rem; margin: 2.5rem 0 .3rem; }
h3 { font-size: .85rem; font-weight: normal; opacity: .75; margin: 1.1rem 0 .2rem; }
h3 b { opacity: 1; } p { margin: .4rem 0; } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dt { font-weight: 600; } dd { margin: 0; } .key, dl { font-size: .9rem; }
.text, .asked, .key { white-space: pre-wrap; overflow-wrap: anywhere; }
.text, .asked, td:first-child { font-family: ui-monospace, monospace; }
.text { border: 1px solid #8886; border-radius: .5rem; padding: .6rem .75rem; }
.asked, .text i { opacity: .65; font-style: normal; } .asked { font-size: .85rem; max-height: 9rem; overflow: auto;
  display: flex; flex-direction: column-reverse; /* opens at its end, where the question is */ }
.text span, .key span { border-radius: .15rem; box-shadow: inset 0 0 0 .5px #8883; }
.text span:hover { outline: 2px solid; } .out { outline: 1px dashed; outline-offset: -1px; }
.key .out { padding: 0 .25rem; }
.text span:hover::after { content: attr(data-t); position: fixed; inset: auto 0 0 0; padding: .6rem 1rem; z-index: 1;
  white-space: pre-wrap; font: 14px/1.5 ui-monospace, monospace; background: Canvas; border-top: 2px solid; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { text-align: right; padding: .1rem .6rem; border-bottom: 1px solid #8883; white-space: pre; }
th:first-child, td:first-child { text-align: left; } summary { cursor: pointer; opacity: .75; font-size: .85rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } body { margin-top: 1rem; } }
"""
TERMS = {
    "sampled": "probability in % under the policy that sampled the token",
    "policy": "probability in % under the policy being improved, as the step last saw it",
    "ratio": "policy over sampled; a clip acts on it",
    "value": "what the critic expected to earn from here on, before the token; 0 without a critic",
    "advantage": "how much better it went than expected, normalised over the step",
    "push": "how hard the loss pulled the token's log-probability, up or down; not yet divided by the step's tokens",
    "left out": "dashed: a clip or a mask kept the token from teaching what its advantage says",
    "⏎ ⇥ ⋯": "a line break, a tab, and a token that only begins a character",
}


def to_page(samples: Sequence[Sample], step: int, run: str) -> str:
    """The page of some samples of one step; neighbours of one group are shown below what they were asked."""
    largest = largest_push(samples)
    groups = (list(found) for _, found in groupby(samples, key=lambda sample: sample.group))
    body = "".join(_group(found, largest) for found in groups)
    title = f"{escape(run)}, step {step}: token by token"
    terms = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in TERMS.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{"".join(_shades())}</style></head>'
        f'<body><h1>{title}</h1><p class="key">{_scale(largest)}</p>'
        "<p>Point at a token, and its numbers appear at the foot of the window.</p>"
        f"<details><summary>what the numbers are</summary><dl>{terms}</dl></details>{body}</body></html>\n"
    )


def _shades() -> Iterator[str]:
    for name, colour in (("u", UP), ("d", DOWN)):
        for shade in range(1, SHADES + 1):
            yield f".{name}{shade} {{ background: rgb({colour} / {0.7 * shade / SHADES:.2f}); }}\n"


def _scale(largest: float) -> str:
    """The colours from the strongest push down to the strongest push up."""
    steps = [f'<span class="d{shade}">   </span>' for shade in range(SHADES, 0, -1)]
    steps += ["<span>   </span>", *(f'<span class="u{shade}">   </span>' for shade in range(1, SHADES + 1))]
    return (
        f'pushed down  −{largest:.2f} {"".join(steps)} +{largest:.2f}  pushed up    <span class="out">left out</span>'
    )


def _group(samples: Sequence[Sample], largest: float) -> str:
    first = samples[0]
    rewards = {sample.reward for sample in samples}
    best = max(rewards) if len(rewards) > 1 else None
    asked = f'<div class="asked">{escape(first.asked.strip())}</div>'
    wanted = f"<p>reference: {escape(first.references[0])}</p>" if first.references and first.references[0] else ""
    shown = "".join(_section(sample, first.asked, best, largest) for sample in samples)
    return f"<section><h2>Prompt {escape(first.group)}</h2>{asked}{wanted}{shown}</section>"


def _section(sample: Sample, asked: str, best: float | None, largest: float) -> str:
    parts = sample.parts[1:] if sample.asked and sample.asked == asked else sample.parts
    text = "".join(_span(part, largest) for part in parts)
    told = f"Sample {escape(sample.name)} · {escape(sample.told())}"
    heading = f"<b>{told} · best of its group</b>" if sample.reward == best else told
    head = "".join(f"<th>{name}</th>" for name in ("token", "version", *NUMBERS))
    rows = "".join(_row(token) for token in sample.tokens)
    return (
        f'<h3>{heading}</h3><div class="text">{text}</div>'
        f'<details><summary>all numbers</summary><div class="wide"><table><tr>{head}</tr>{rows}</table></div></details>'
    )


def _span(part: str | SeenToken, largest: float) -> str:
    if isinstance(part, str):
        return f"<i>{escape(part)}</i>"
    names = [f"{name} {value}" for name, value in zip(NUMBERS, numbers(part), strict=True)]
    names[0], names[1] = f"{names[0]} %", f"{names[1]} %"
    told = f"{_visible(part.text)}    {'   '.join(names)}   version {part.version}"
    classes = " ".join(filter(None, (_shade(part, largest), "out" if part.left_out else "")))
    return f'<span class="{classes}" data-t="{escape(told)}">{escape(_broken(part.text))}</span>'


def _shade(token: SeenToken, largest: float) -> str:
    shade = min(SHADES, round(SHADES * abs(token.push) / largest)) if largest else 0
    return f"{'u' if token.push > 0 else 'd'}{shade}" if shade else ""


def _row(token: SeenToken) -> str:
    cells = (escape(_visible(token.text)), str(token.version), *numbers(token))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _broken(text: str) -> str:
    """With a mark before each line break and tab, which are coloured nowhere else."""
    return text.replace("\n", "⏎\n").replace("\t", "⇥\t")


def _visible(text: str) -> str:
    """On one line."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
