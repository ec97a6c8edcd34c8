"""What each named task learns: the committed configuration, seed by seed, beside trivial baselines.

    python benchmarks/tasks.py --tasks qa translation summarization --seeds 0 1 2 --write

Every run is the command of the documentation, `rollcast train deploy/configs/TASK.toml`, with a seed and a name of its
own; a task whose base model cannot begin is warmed up first with `rollcast sft`, once, and then starts every seed from
that policy. Before, after and baselines are of the same held-out questions, answered greedily. A run that has its last
row already is not made again.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium
import psutil
from measuring import finish

import rollcast_envs  # noqa: F401  (registers the environments)
from rollcast import metrics
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.demo import prepare_model
from rollcast.evaluate import figures
from rollcast_envs.data.building import likeness
from rollcast_learners.types import Prompt, Stream, Trajectory, Turn

ROOT = Path(__file__).resolve().parents[1]
BASE_MODEL = "models/smollm2-135m-instruct"
Answer = Callable[[dict[str, Any], str], str]


@dataclass(frozen=True)
class Task:
    """One row of the table: which figure counts, and what anybody could answer without a model."""

    metric: str
    baselines: dict[str, Callable[[list[dict[str, Any]]], Answer]]
    """Name -> (records of the train split) -> (record, question) -> answer."""


def copied(_: list[dict[str, Any]]) -> Answer:
    return lambda record, question: question


def most_frequent(train: list[dict[str, Any]]) -> Answer:
    """The train split's most frequent answer to questions of the same kind."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in train:
        counts[record["kind"]][record["references"][0]] += 1
    return lambda record, question: counts[record["kind"]].most_common(1)[0][0]


def most_similar(train: list[dict[str, Any]]) -> Answer:
    """The translation of the train sentence that is most like the question: a translation memory."""
    sources = [record["source"] for record in train]

    def answer(record: dict[str, Any], question: str) -> str:
        best = max(range(len(sources)), key=lambda i: overlap[question][i])
        return str(train[best]["target"][0])

    class Overlap(dict[str, list[float]]):
        def __missing__(self, question: str) -> list[float]:
            self[question] = likeness(sources, [question]).tolist()
            return self[question]

    overlap = Overlap()
    return answer


def first_words(count: int) -> Callable[[list[dict[str, Any]]], Answer]:
    return lambda _: lambda record, question: " ".join(question.split()[:count])


TASKS = {
    "qa": Task("QA-v0/f1", {"most frequent answer of the kind": most_frequent}),
    "translation": Task(
        "Translation-v0/corpus_chrf", {"copy the source": copied, "most similar train sentence": most_similar}
    ),
    "summarization": Task("Summarization-v0/rougeL", {"first 12 words": first_words(12), "copy the document": copied}),
}


def config_of(task: str) -> RunConfig:
    return load_config(ROOT / "deploy" / "configs" / f"{task}.toml", [f"--model.path={BASE_MODEL}"])


def baseline(task: str, name: str) -> dict[str, float]:
    """Figures of a trivial answerer on the run's own held-out questions."""
    config = config_of(task)
    (env,) = config.env
    train: Any = gymnasium.make(env.id, **{**env.kwargs, "split": "train"}).unwrapped
    held_out: Any = gymnasium.make(env.id, **{**env.kwargs, "split": config.eval.split})
    answer = TASKS[task].baselines[name]([train.records[i] for i in range(train.size)])
    size = held_out.unwrapped.size
    played = [_played(held_out, env.id, i, answer) for i in range(min(config.eval.samples or size, size))]
    return {key: value for key, value in figures(played).values.items() if key.startswith("eval/")}


def _played(env: Any, env_id: str, index: int, answer: Answer) -> Trajectory:
    import numpy as np

    question, info = env.reset(options={"index": index})
    said = answer(info["fields"], question)
    _, reward, terminated, truncated, info = env.step(said)
    nothing = Stream(np.zeros(1, np.int32), np.zeros(1, np.bool_), np.zeros(1, np.float32), ())
    turn = Turn(0, 0, 1, question, said, reward, "stop")
    prompt = Prompt(str(index), str(index), env_id, index)
    references = tuple(info["references"])
    return Trajectory(
        prompt, (nothing,), (turn,), terminated, truncated, info["metrics"], info["kind"], references=references
    )


def command(verb: str, config: str, name: str, *more: str) -> float:
    """Runs `rollcast VERB CONFIG --run NAME`; returns its wall seconds, start-up and all."""
    started = time.monotonic()
    words = [sys.executable, "-m", "rollcast", verb, f"deploy/configs/{config}.toml", "--run", name, *more]
    print("$ rollcast", *words[3:], flush=True)
    subprocess.run(words, cwd=ROOT, check=True)
    return time.monotonic() - started


def rows_of(name: str) -> list[dict[str, Any]]:
    return metrics.read(ROOT / "runs" / name / "metrics.jsonl")


def done(name: str, steps: int) -> bool:
    return any(row["step"] == steps for row in rows_of(name))


def evaluated(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith(("eval/", "eval_kind/"))}


def run_task(task: str, seeds: list[int]) -> dict[str, Any]:
    """Warm start where the task has one, every seed, and the baselines beside them."""
    warm = ROOT / "deploy" / "configs" / f"{task}-sft.toml"
    result: dict[str, Any] = {"task": task, "metric": TASKS[task].metric, "seconds": {}}
    if warm.exists():
        if not (ROOT / "runs" / f"{task}-sft" / "policy").is_dir():
            result["seconds"]["sft"] = command("sft", f"{task}-sft", f"{task}-sft")
        base = f"{task}-base"
        if not done(base, 0):
            command("train", task, base, f"--model.path={BASE_MODEL}", "--run.steps=1", "--eval.every=2")
        result["base"] = evaluated(rows_of(base)[0])
    for seed in seeds:
        name = f"{task}-seed{seed}"
        if not done(name, config_of(task).run.steps):
            result["seconds"][str(seed)] = command("train", task, name, f"--run.seed={seed}")
        rows = [row for row in rows_of(name) if evaluated(row)]
        result.setdefault("runs", {})[str(seed)] = [{"step": row["step"], **evaluated(row)} for row in rows]
    result["baselines"] = {name: baseline(task, name) for name in TASKS[task].baselines}
    key = f"eval/{TASKS[task].metric}"
    rises = [rows[-1][key] - rows[0][key] for rows in result["runs"].values()]
    error = statistics.stdev(rises) / len(rises) ** 0.5 if len(rises) > 1 else float("nan")
    result |= {"rise": fmean(rises), "standard_error": error, "rise_in_errors": fmean(rises) / error if error else None}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="save to benchmarks/results/")
    arguments = parser.parse_args()
    prepare_model(ROOT / BASE_MODEL)
    for task in arguments.tasks:
        result = {
            "benchmark": "tasks",
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU",
            **run_task(task, arguments.seeds),
        }
        finish(f"tasks-{task}", result, arguments.write)


if __name__ == "__main__":
    main()
