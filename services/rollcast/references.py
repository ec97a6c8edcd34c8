"""References as trajectories: what a policy would have left behind, had it said what the data say.

Owns: opening an environment's task and writing its reference, or its demonstration of several turns, into a token
stream. Does not know losses, nor how the policy plays (`episode.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollcast.chat import ChatCodec
from rollcast.config import EnvSection
from rollcast.errors import UsageError
from rollcast.evaluate import made_once, on_split
from rollcast_learners.types import Prompt, Stream, Trajectory, Turn


class ReferenceSource:
    """The tasks of one environment's split, each with the answer to learn."""

    def __init__(self, env: EnvSection, split: str, codec: ChatCodec, max_tokens: int) -> None:
        self.env = env
        self.codec = codec
        self.max_tokens = max_tokens
        self.made: Any = made_once(env, on_split(env, split))
        self.task: Any = self.made.unwrapped
        self.size: int | None = getattr(self.task, "size", None)

    def example(self, number: int) -> Trajectory:
        """Task `number` (modulo the size of the split; of an endless environment, the one of that seed).

        Raises `UsageError` when the environment gives no reference to learn from.
        """
        options = {"index": number % self.size} if self.size else None
        observation, info = self.made.reset(seed=number, options=options)
        turns = self._answers(info)
        told, ids = self.codec.open(self.task.system_prompt, observation, self.task.few_shot, self.task.tools)
        ids, trained = list(ids), [False] * len(ids)
        said: list[Turn] = []
        for position, answer in enumerate(turns):
            answer_ids = self.codec.answer_ids(answer)
            said.append(Turn(0, len(ids), len(ids) + len(answer_ids), observation, answer, 0.0, "stop"))
            ids += answer_ids
            trained += [True] * len(answer_ids)
            if position == len(turns) - 1:
                break
            observation, _, terminated, truncated, info = self.made.step(answer)
            if terminated or truncated:
                break
            told, suffix = self.codec.extend(told, answer_ids, observation, str(info.get("role", "user")))
            if suffix is None:  # The template rewrites what was said: a stream cannot go on, and what is there counts.
                break
            ids += suffix
            trained += [False] * len(suffix)
        prompt = Prompt(f"{self.env.label}.{number}", f"{self.env.label}.{number}", self.env.id, number)
        stream = _stream(ids[: self.max_tokens], trained[: self.max_tokens])
        return Trajectory(prompt, (stream,), tuple(said), terminated=True, truncated=False)

    def close(self) -> None:
        self.made.close()

    def _answers(self, info: Mapping[str, Any]) -> Sequence[str]:
        """The agent's turns: the environment's own demonstration, else the preferred reference."""
        if hasattr(self.task, "demonstration"):
            return [str(turn) for turn in self.task.demonstration()]
        references = info.get("references") or ()
        if not references:
            raise UsageError(
                f"{self.env.id} gives no reference to learn from.",
                f"The task {info.get('task_id', '?')!r} has no references in its info, and no demonstration().",
                "Choose an environment with references, or train it with `rollcast train`.",
            )
        return [str(references[0])]


def _stream(ids: Sequence[int], trained: Sequence[bool]) -> Stream:
    return Stream(np.array(ids, np.int32), np.array(trained, np.bool_), np.zeros(len(ids), np.float32), ())
