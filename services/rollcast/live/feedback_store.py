"""Answers served and what was said of them, in a database.

Owns: how both are written, what a second word on one answer does, how long they are kept, and reading them again. Does
not know who calls, or when: that is one writer (`feedback_writer.py`), from one thread at a time.

Of each kind (thumb, score, edit) the latest word counts, and the other kinds stay. Of two answers the latest
preference counts. Whoever got the answer may speak of it, by API key, and an admin may speak of all.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, Engine, delete, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from rollcast.live.feedback import FeedbackReceipt, FeedbackRequest, ServedAnswer, not_comparable, unknown_answer
from rollcast.live.feedback_tables import answers, preferences, ratings
from rollcast_learners.types import VersionSpan

DAY_S = 86400.0
MIB = 1 << 20
PRUNE_TO = 0.9
"""Share of the size limit down to which a full database is emptied, so that not every answer empties it again."""
CHUNK = 500
"""Rows that are removed at a time."""
OVERHEAD = 200
"""Bytes of a row beside its texts and tokens, about."""


@dataclass(frozen=True)
class Kept:
    """An answer and what was said of it. Store -> reader."""

    answer: ServedAnswer
    thumb: str | None = None
    score: float | None = None
    edit: str | None = None
    preferred_to: tuple[str, ...] = ()
    told: float | None = None
    """Epoch seconds of the latest rating."""


class FeedbackStore:
    """The database, to write to. Every method is one transaction, and raises `SQLAlchemyError` when it fails."""

    def __init__(self, engine: Engine, keep_days: float, max_mib: float) -> None:
        self.engine = engine
        self.keep_s = keep_days * DAY_S
        self.max_bytes = int(max_mib * MIB)
        with engine.connect() as connection:
            self.bytes = int(connection.execute(select(func.coalesce(func.sum(answers.c.size), 0))).scalar_one())

    def add(self, served: Sequence[ServedAnswer]) -> int:
        """Keeps answers, and says how many are new. One that is there already stays as it is."""
        rows = [_row(answer) for answer in served]
        with self.engine.begin() as connection:
            known = set(connection.scalars(select(answers.c.id).where(answers.c.id.in_([row["id"] for row in rows]))))
            fresh = {row["id"]: row for row in rows if row["id"] not in known}
            if fresh:
                connection.execute(answers.insert(), list(fresh.values()))
        self.bytes += sum(row["size"] for row in fresh.values())
        return len(fresh)

    def give(self, request: FeedbackRequest, key: str, admin: bool, now: float) -> FeedbackReceipt:
        """Keeps what is said. Raises `ApiError` for answers unknown, not of this key, or not comparable."""
        with self.engine.begin() as connection:
            answer = self._owned(connection, "answer", request.answer, key, admin)
            replaced = []
            if request.preferred_to is not None:
                other = self._owned(connection, "preferred_to", request.preferred_to, key, admin)
                if answer.prompt_ids != other.prompt_ids:
                    raise not_comparable(answer.id, other.id)
                replaced += self._prefer(connection, answer.id, other.id, key, now)
            said = {kind: value for kind, value in request.said.items() if kind != "preferred_to"}
            if said:
                replaced += self._rate(connection, answer.id, said, key, now)
            return _receipt(connection, answer, replaced)

    def prune(self, now: float) -> int:
        """Removes what is too old, and of what is too much first the oldest that nobody spoke of; how many answers."""
        with self.engine.begin() as connection:
            gone = 0
            if self.keep_s:
                gone += self._remove(connection, answers.c.time < now - self.keep_s)
            self.bytes = int(connection.execute(select(func.coalesce(func.sum(answers.c.size), 0))).scalar_one())
            if self.max_bytes and self.bytes > self.max_bytes:
                gone += self._shrink(connection, int(self.max_bytes * PRUNE_TO))
        if gone and self.engine.dialect.name == "sqlite":
            self._give_space_back()
        return gone

    @property
    def full(self) -> bool:
        """Whether there is more than may be kept."""
        return bool(self.max_bytes) and self.bytes > self.max_bytes

    def close(self) -> None:
        self.engine.dispose()

    def _give_space_back(self) -> None:
        raw = self.engine.raw_connection()
        try:
            # As a script: it frees a page at each step, and `execute` takes one step.
            raw.cursor().executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")
        finally:
            raw.close()

    def _owned(self, connection: Connection, param: str, answer: str, key: str, admin: bool) -> Any:
        columns = (answers.c.id, answers.c.key, answers.c.prompt_ids, answers.c.spans)
        found = connection.execute(select(*columns).where(answers.c.id == answer)).one_or_none()
        if found is None or not (admin or found.key == key):
            raise unknown_answer(param, answer)
        return found

    def _prefer(self, connection: Connection, better: str, worse: str, key: str, now: float) -> list[str]:
        pair = preferences.c
        either = or_((pair.better == better) & (pair.worse == worse), (pair.better == worse) & (pair.worse == better))
        before = connection.execute(delete(preferences).where(either)).rowcount
        connection.execute(preferences.insert().values(better=better, worse=worse, key=key, time=now))
        return ["preferred_to"] if before else []

    def _rate(self, connection: Connection, answer: str, said: dict[str, Any], key: str, now: float) -> list[str]:
        before = connection.execute(select(ratings).where(ratings.c.answer == answer)).mappings().one_or_none()
        values = {**said, "key": key, "time": now}
        if "edit" in said:
            values["edit"] = json.dumps(said["edit"])
        dialect = postgresql if self.engine.dialect.name == "postgresql" else sqlite
        row = dialect.insert(ratings).values(answer=answer, **values)
        connection.execute(row.on_conflict_do_update(index_elements=[ratings.c.answer], set_=values))
        return [kind for kind in said if before is not None and before[kind] is not None]

    def _shrink(self, connection: Connection, target: int) -> int:
        gone = 0
        for nobody_spoke in (True, False):
            while self.bytes > target:
                oldest = select(answers.c.id, answers.c.size).order_by(answers.c.time, answers.c.id).limit(CHUNK)
                rows = connection.execute(oldest.where(~_spoken_of()) if nobody_spoke else oldest).all()
                if not rows:
                    break
                chosen = []
                for row in rows:
                    if self.bytes > target:
                        chosen.append(row.id)
                        self.bytes -= row.size
                gone += self._remove(connection, answers.c.id.in_(chosen))
        return gone

    def _remove(self, connection: Connection, which: ColumnElement[bool]) -> int:
        """Ratings and preferences go with their answers."""
        return connection.execute(delete(answers).where(which)).rowcount


def read(engine: Engine, *, rated_only: bool = False, since: float = 0.0) -> Iterator[Kept]:
    """All answers in the order of their time, with what was said of them; with `rated_only` those spoken of alone."""
    columns = (ratings.c.thumb, ratings.c.score, ratings.c.edit, ratings.c.time.label("told"))
    wanted = select(answers, *columns).outerjoin(ratings, ratings.c.answer == answers.c.id)
    wanted = wanted.where(answers.c.time >= since).order_by(answers.c.time, answers.c.id)
    if rated_only:
        wanted = wanted.where(_spoken_of())
    with engine.connect() as connection:
        pairs: dict[str, list[str]] = {}
        for better, worse in connection.execute(select(preferences.c.better, preferences.c.worse)):
            pairs.setdefault(better, []).append(worse)
        for row in connection.execution_options(yield_per=CHUNK).execute(wanted):
            edit = None if row.edit is None else json.loads(row.edit)
            yield Kept(_answer(row), row.thumb, row.score, edit, tuple(sorted(pairs.get(row.id, ()))), row.told)


def _spoken_of() -> ColumnElement[bool]:
    spoken = (ratings.c.answer, preferences.c.better, preferences.c.worse)
    return or_(*(answers.c.id.in_(select(column)) for column in spoken))


def _receipt(connection: Connection, answer: Any, replaced: list[str]) -> FeedbackReceipt:
    columns = select(ratings.c.thumb, ratings.c.score, ratings.c.edit)
    rating: Any = connection.execute(columns.where(ratings.c.answer == answer.id)).one_or_none()
    thumb, score, edit = (None, None, None) if rating is None else rating
    others = connection.scalars(select(preferences.c.worse).where(preferences.c.better == answer.id))
    spans = json.loads(answer.spans)
    return FeedbackReceipt(
        answer=answer.id,
        policy_version=spans[-1][0] if spans else -1,
        thumb=thumb,
        score=score,
        edit=None if edit is None else json.loads(edit),
        preferred_to=tuple(sorted(others)),
        replaced=tuple(sorted(replaced)),
    )


def _row(answer: ServedAnswer) -> dict[str, Any]:
    row = {
        "id": answer.id,
        "time": answer.time,
        "key": answer.key,
        "prompt": json.dumps(answer.prompt),
        "text": json.dumps(answer.text),
        "prompt_ids": answer.prompt_ids_P.astype("<i4").tobytes(),
        "answer_ids": answer.answer_ids_A.astype("<i4").tobytes(),
        "logprobs": answer.logprobs_A.astype("<f4").tobytes(),
        "spans": json.dumps([[span.version, span.start, span.end] for span in answer.spans]),
        "temperature": answer.temperature,
        "finish_reason": answer.finish_reason,
    }
    return row | {"size": OVERHEAD + sum(len(value) for value in row.values() if isinstance(value, str | bytes))}


def _answer(row: Any) -> ServedAnswer:
    return ServedAnswer(
        id=row.id,
        time=row.time,
        key=row.key,
        prompt=json.loads(row.prompt),
        text=json.loads(row.text),
        prompt_ids_P=np.frombuffer(row.prompt_ids, "<i4"),
        answer_ids_A=np.frombuffer(row.answer_ids, "<i4"),
        logprobs_A=np.frombuffer(row.logprobs, "<f4"),
        spans=tuple(VersionSpan(*span) for span in json.loads(row.spans)),
        temperature=row.temperature,
        finish_reason=row.finish_reason,
    )
