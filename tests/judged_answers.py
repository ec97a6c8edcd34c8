"""Served answers and what people said of them, for tests that learn from feedback.

Owns: making them, and a database of a run that was served. Does not know who reads it.
"""

from typing import Any

import numpy as np

from rollcast.live.feedback import FeedbackRequest, ServedAnswer
from rollcast.live.feedback_store import FeedbackStore
from rollcast.live.feedback_tables import open_to_write, sqlite_url
from rollcast.rundir import RunDir
from rollcast_learners.types import VersionSpan


def served(name: str, text: str, question: str = "Capital of Peru?", prompt: Any = None) -> ServedAnswer:
    ids = np.frombuffer(question.encode(), np.uint8).astype(np.int32)
    spans = (VersionSpan(3, 0, 2),)
    told = np.array([7, 2], np.int32), np.array([-0.5, -0.25], np.float32)
    asked = [{"role": "user", "content": question}] if prompt is None else prompt
    return ServedAnswer(name, 1e9, "", asked, text, ids, *told, spans, 1.0, "stop")


def fill(folder: RunDir, questions: int = 12) -> None:
    """Answers to that many questions, one liked and one not of each, as people would leave them."""
    store = FeedbackStore(open_to_write(sqlite_url(folder.feedback)), 0, 0)
    for n in range(questions):
        question = f"What is city number {n}?"
        good, bad = served(f"good-{n}", f"City {n}", question), served(f"bad-{n}", "I do not know.", question)
        store.add([good, bad])
        store.give(FeedbackRequest(answer=good.id, thumb="up", preferred_to=bad.id), "", True, 1e9)
    store.close()
