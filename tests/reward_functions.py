"""Reward functions as users write them, in each of the forms that rollcast takes."""

from typing import Any


def moody(answer: str, references: list[str], **fields: Any) -> float:
    """Pays for short answers, and fails on about every third one: NaN is no reward."""
    if len(answer) % 3 == 0:
        return float("nan")
    return 1.0 / (1.0 + len(answer))


def trl_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """TRL's form."""
    return [float(len(completion)) for completion in completions]


def broken(answer: str, references: list[str]) -> float:
    raise RuntimeError("the judge is on holiday")


def uneven(answer: str, references: list[str]) -> float:
    """Tells answers apart for some questions only: about half of the groups earn the same throughout."""
    return 0.0 if len(references[0]) % 2 == 0 else float(len(answer) % 7)


def indifferent(answer: str, references: list[str]) -> float:
    return 0.5
