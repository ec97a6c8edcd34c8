"""`rollouts/step_N.jsonl`: what was played, one line an episode, in words and in tokens.

Owns: the schema of that file (docs/files.md). Does not know who plays or reads it.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollcast_learners.types import TokenDetails, Trajectory


def record(trajectory: Trajectory, learned: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """One trajectory as JSON; `learned` is what the learner made of its trained tokens."""
    return {
        "prompt": trajectory.prompt.id,
        "group": trajectory.prompt.group_id,
        "env": trajectory.prompt.env_id,
        "kind": trajectory.kind,
        "reward": trajectory.reward,
        "metrics": dict(trajectory.metrics),
        "parts": dict(trajectory.parts),
        "references": list(trajectory.references),
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "error": trajectory.error,
        "versions": list(trajectory.versions),
        "turns": [
            {
                "stream": turn.stream,
                "start": turn.start,
                "end": turn.end,
                "observation": turn.observation,
                "answer": turn.answer,
                "reward": turn.reward,
                "finish_reason": turn.finish_reason,
            }
            for turn in trajectory.turns
        ],
        "streams": [
            {
                "token_ids": stream.token_ids_T.tolist(),
                "trained": stream.trained_T.astype(int).tolist(),
                "logprobs": [round(x, 5) for x in stream.logprobs_T.tolist()],
                "spans": [[span.version, span.start, span.end] for span in stream.spans],
            }
            for stream in trajectory.streams
        ],
        **({} if learned is None else {"learned": learned}),
    }


def learned_of(details: Iterable[TokenDetails]) -> dict[int, dict[str, list[float]]]:
    """Columns of each episode, by its position in the step."""
    found: dict[int, dict[str, list[float]]] = {}
    for part in details:
        columns = {
            "logprobs": part.logprobs_N,
            "values": part.values_N,
            "advantages": part.advantages_N,
            "push": part.push_N,
        }
        stops = np.cumsum(part.length_E)
        for index, stop, length in zip(part.index_E.tolist(), stops.tolist(), part.length_E.tolist(), strict=True):
            found[index] = {name: _rounded(column[stop - length : stop]) for name, column in columns.items()}
    return found


def _rounded(column: NDArray[np.float32]) -> list[float]:
    """To five places, and 0 for what is not finite: JSON has no word for it, and the guard tells of it."""
    return [round(x, 5) if math.isfinite(x) else 0.0 for x in column.tolist()]


def write(folder: Path, step: int, trajectories: Iterable[Trajectory], details: Iterable[TokenDetails] = ()) -> None:
    """The file appears whole: `rollcast rollouts --follow` may be reading."""
    learned = learned_of(details)
    lines = [json.dumps(record(t, learned.get(number))) + "\n" for number, t in enumerate(trajectories)]
    partial = folder / f".step_{step}.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(folder / f"step_{step}.jsonl")


def read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def files(folder: Path) -> list[Path]:
    """The files by step, oldest first."""
    return sorted(folder.glob("step_*.jsonl"), key=step_of)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def cut(folder: Path, step: int) -> None:
    """Removes what was played for steps after the checkpoint a run resumes from."""
    for path in files(folder):
        if step_of(path) > step:
            path.unlink()
