"""`rollouts/step_N.jsonl`: what was played, one line an episode, in words and in tokens.

Owns: the schema of that file (docs/files.md). Does not know who plays or reads it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rollcast_learners.types import Trajectory


def record(trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory as JSON."""
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
    }


def write(folder: Path, step: int, trajectories: Iterable[Trajectory]) -> None:
    """The file appears whole: `rollcast rollouts --follow` may be reading."""
    lines = [json.dumps(record(trajectory)) + "\n" for trajectory in trajectories]
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
