"""Feedback as a data set: judged questions for `rollcast/Feedback-v0`, or every answer with its exact tokens.

Owns: what a thumb, a score, a preference and an edit say of an answer's worth, and the form of both files
(docs/feedback.md). Does not know the database (`rollcast.live.feedback_store`) or what is learned from it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from blake3 import blake3

from rollcast.config import RunConfig
from rollcast.errors import UsageError
from rollcast.live.feedback_store import Kept, read
from rollcast.live.feedback_tables import database_of, open_to_read
from rollcast.rundir import RunDir, write_atomic


@dataclass(frozen=True)
class Written:
    """What an export wrote and left out."""

    path: str
    rows: int
    answers: int
    """Judged answers in the rows; with exact tokens, all answers."""
    left_out: dict[str, int]
    """Questions that were left out, by reason."""


@dataclass
class _Asked:
    """One question, and what was said of each answer to it."""

    prompt: list[dict[str, Any]]
    values: dict[str, list[float]] = field(default_factory=dict)
    versions: set[int] = field(default_factory=set)
    told: float = 0.0

    def judge(self, text: str, value: float) -> None:
        self.values.setdefault(text, []).append(value)


def export_feedback(run: RunDir, config: RunConfig, target: Path, *, tokens: bool = False) -> Written:
    """Writes JSON lines: one a judged question, or with `tokens` one an answer.

    Raises `UsageError` when there is nothing to write or `target` cannot be written, `RunFailed` without a database.
    """
    engine = open_to_read(database_of(run, config.feedback))
    try:
        kept = list(read(engine, rated_only=not tokens))
    finally:
        engine.dispose()
    left_out: dict[str, int] = {}
    rows = [_exact(one) for one in kept] if tokens else list(judged_questions(kept, left_out))
    if not rows:
        raise _nothing(run, left_out)
    try:
        write_atomic(target, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        fix = "Free that path, or name another file."
        raise UsageError(f"{target} cannot be written.", f"{type(error).__name__}: {error}", fix) from error
    answers = len(rows) if tokens else sum(len(row["judged"]) for row in rows)
    return Written(str(target), len(rows), answers, left_out)


def judged_questions(kept: Iterable[Kept], left_out: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A row for each question of which an answer was liked; `left_out` counts the others by reason."""
    for asked in _by_question(kept):
        opening = _opening(asked.prompt)
        judged = sorted(((text, fmean(values)) for text, values in asked.values.items()), key=lambda pair: -pair[1])
        liked = [text for text, value in judged if value > 0 and text.strip()]
        reason = "not a conversation" if opening is None else None if liked else "no answer was liked"
        if opening is None or reason is not None:
            left_out[str(reason)] = left_out.get(str(reason), 0) + 1
            continue
        yield {
            "id": blake3(json.dumps(asked.prompt).encode()).hexdigest()[:16],
            **opening,
            "references": liked,
            "judged": [{"answer": text, "value": round(value, 4)} for text, value in judged],
            "versions": sorted(asked.versions),
            "time": asked.told,
        }


def values_of(one: Kept, by_id: dict[str, Kept]) -> Iterator[tuple[Kept, str, float]]:
    """What was said of an answer, as (whose answer, text, value in [-1, 1]).

    A score counts as 2 score - 1 and goes before a thumb. A preference and an edit compare: they make the better text
    1 and the worse one -1, unless that answer has a score or a thumb of its own.
    """
    own = None if one.thumb is None else 1.0 if one.thumb == "up" else -1.0
    own = own if one.score is None else 2 * one.score - 1
    if own is not None:
        yield one, one.answer.text, own
    if one.edit is not None and one.edit != one.answer.text:
        yield one, one.edit, 1.0
        if own is None:
            yield one, one.answer.text, -1.0
    for other in (by_id[name] for name in one.preferred_to if name in by_id):
        if own is None:
            yield one, one.answer.text, 1.0
        if other.score is None and other.thumb is None:
            yield other, other.answer.text, -1.0


def live_rating(kept: Iterable[Kept]) -> tuple[float, int]:
    """The live metric: mean worth in [0, 1] of the answers that were given a score or a thumb, and how many those are.

    0.0 of 0 when there are none. Preferences and edits compare; they do not say how good an answer is.
    """
    worth = [one.score if one.score is not None else float(one.thumb == "up") for one in kept if _is_rated(one)]
    return (fmean(worth), len(worth)) if worth else (0.0, 0)


def _is_rated(one: Kept) -> bool:
    return one.score is not None or one.thumb is not None


def _by_question(kept: Iterable[Kept]) -> Iterable[_Asked]:
    by_id = {one.answer.id: one for one in kept}
    asked: dict[str, _Asked] = {}
    for one in by_id.values():
        for whose, text, value in values_of(one, by_id):
            prompt = whose.answer.prompt
            key = json.dumps(prompt)
            question = asked.setdefault(key, _Asked(prompt if isinstance(prompt, list) else []))
            question.judge(text, value)
            question.versions |= {span.version for span in whose.answer.spans}
            question.told = max(question.told, one.told or whose.answer.time)
    return asked.values()


def _opening(prompt: list[dict[str, Any]]) -> dict[str, Any] | None:
    """System turn, history and question of a conversation; None for what an environment could not ask again."""
    turns = [(turn["role"], _text(turn["content"])) for turn in prompt]
    system = turns.pop(0)[1] if turns and turns[0][0] in ("system", "developer") else None
    roles = [role for role, _ in turns]
    if not turns or roles != [("user", "assistant")[place % 2] for place in range(len(turns))] or len(turns) % 2 == 0:
        return None
    texts = [text for _, text in turns]
    if not texts[-1].strip():
        return None
    history = [list(pair) for pair in zip(texts[:-1:2], texts[1::2], strict=True)]
    return {
        "question": texts[-1],
        **({"system": system} if system else {}),
        **({"history": history} if history else {}),
    }


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _exact(one: Kept) -> dict[str, Any]:
    answer = one.answer
    return {
        "id": answer.id,
        "time": answer.time,
        "key": answer.key,
        "prompt": answer.prompt,
        "text": answer.text,
        "prompt_ids": answer.prompt_ids_P.tolist(),
        "answer_ids": answer.answer_ids_A.tolist(),
        "logprobs": [round(x, 5) for x in answer.logprobs_A.tolist()],
        "spans": [[span.version, span.start, span.end] for span in answer.spans],
        "temperature": answer.temperature,
        "finish_reason": answer.finish_reason,
        "thumb": one.thumb,
        "score": one.score,
        "edit": one.edit,
        "preferred_to": list(one.preferred_to),
    }


def _nothing(run: RunDir, left_out: dict[str, int]) -> UsageError:
    why = "; ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "Nobody has said anything yet."
    fix = "Serve the run and give feedback: rollcast chat, the page, or POST /v1/feedback."
    return UsageError(f"The run {run.path.name} has no feedback to write.", why, fix)
