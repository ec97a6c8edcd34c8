"""What tasks of several turns share: a scripted solution of each episode, and examples made from such solutions.

Owns: the contract of `demonstration` and how few-shot examples come of it. Does not know what a task is about.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rollcast_envs.errors import DataError
from rollcast_envs.text import TextEnv

Exchange = tuple[str, str]
Option = TypeVar("Option")


class MultiTurnTask(TextEnv):
    """A task whose episodes have several turns and can be solved by a script."""

    @abstractmethod
    def demonstration(self) -> list[str]:
        """The answers that solve the open episode from its first turn on; they use nothing that a model cannot see.

        `sft` trains on them, and the tests prove with them that every task can be solved.
        """


def exchanges(env: MultiTurnTask, index: int) -> list[Exchange]:
    """Task `index` as its demonstration plays it: what was said to the model, and what it answered."""
    said, _ = env.reset(options={"index": index})
    played = []
    for answer in env.demonstration():
        played.append((said, answer))
        said, _, terminated, truncated, _ = env.step(answer)
        if terminated or truncated:
            break
    return played


def few_shot_examples(
    wanted: int | Sequence[Sequence[str]], open_train: Callable[[], MultiTurnTask]
) -> tuple[Exchange, ...]:
    """Examples as given, or the demonstrated episodes of the first `wanted` tasks of the train split, turn by turn."""
    if not isinstance(wanted, int):
        return tuple((str(said), str(answer)) for said, answer in wanted)
    if wanted < 0:
        raise ValueError(f"few_shot is {wanted}; expected 0 or more episodes, or a list of [question, answer]")
    if not wanted:
        return ()
    env = open_train()
    return tuple(pair for index in range(min(wanted, env.size or 0)) for pair in exchanges(env, index))


def some(tasks: Sequence[Option], what: str, split: str) -> Sequence[Option]:
    """The tasks of a split, if there are any. Raises `DataError` where train was cut into too many parts."""
    if not tasks:
        why = "too few are left in this part of the built-in data"
        raise DataError(f"split {split!r} has no {what}", why, "cut train into fewer parts")
    return tasks


def one_of(options: Sequence[Option], draw: np.random.Generator) -> Option:
    return options[int(draw.integers(len(options)))]
