"""End to end: rollcast and a peer in turn on one machine, A B A B, on one of several workloads.

    python benchmarks/end_to_end.py fixed --peer-python TRL_ENV/bin/python --pairs 3 --write

Both sides load the same model folder, are asked the questions of `rollcast/QA-v0` (the driver writes a file of them
for the peer), sample as many answers of a prompt and of a step, of at most as many tokens, and train every token they
sampled, once, in bf16. A run is timed from the end of its first steps (`SKIPPED`), so that start-up and warm-up do not
count. CPU seconds are those of the whole process tree in the same window; peak memory is the largest sum of unique
memory (USS) seen. Beside the speed stand what the samples of the window were worth, how long they were, and how far
rollcast's engine and learner were apart. With `--write`, pairs are added to the file of the same day.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil

import rollcast_envs  # noqa: F401  (registers the environments)
from rollcast import metrics, records

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
QUESTIONS = 1000
SKIPPED = {"rollcast": 2, "peer": 1}
"""First steps that do not count. Rollcast's first two are learned from while its workers fill the buffer."""
MARK = "ROLLCAST_BENCHMARK"
FIGURES: dict[str, Callable[[list[float]], float]] = {
    "logprob_gap/mean": max,
    "logprob_gap/max": max,
    "staleness/mean": statistics.fmean,
    "busy/learner": statistics.fmean,
    "busy/rollout": statistics.fmean,
    "tokens/useful_ratio": statistics.fmean,
    "sync/publish_s": statistics.fmean,
}
"""What rollcast says of its steps (docs/files.md) that is told beside the speed, and how the steps of a window join."""
NEVER_SAMPLED = "<jupyter_script>"
"""A token of SmolLM2's that it was hardly trained on: as the end of an answer it never comes."""


@dataclass(frozen=True)
class Workload:
    """One comparison: rollcast's configuration, and the peers' scripts with their arguments."""

    config: str
    peers: dict[str, tuple[str, ...]]
    samples: int = 64
    endless: bool = False
    """Whether no answer may end before its last token: both sides load a copy of the model that never ends one."""
    small: bool = False
    """Whether both sides load random weights of a small shape, so that waiting weighs more than computing."""
    environment: bool = False
    """Whether the questions are an argument of rollcast's environment too."""


GRPO = ("trl_grpo.py",)
MULTITURN = {
    f"trl_grpo_{how}": (*GRPO, "--turns", "4", "--tokens", "16", "--group", "4", "--environments", how)
    for how in ("in-turn", "at-once")
}
PPO = {"trl_ppo": ("trl_ppo.py", "--microbatch", "32")}
WORKLOADS = {
    "natural": Workload("peer.toml", {"trl_grpo": GRPO}),
    "fixed": Workload("fixed.toml", {"trl_grpo": GRPO}, endless=True),
    "lognormal": Workload("lognormal.toml", {"trl_grpo": (*GRPO, "--tokens", "128", "--microbatch", "32")}),
    "multiturn": Workload("multiturn.toml", MULTITURN, samples=32, environment=True),
    "multiturn_small": Workload("multiturn.toml", MULTITURN, samples=32, small=True, environment=True),
    "rloo": Workload("rloo.toml", {"trl_rloo": (*GRPO, "--algorithm", "rloo")}, endless=True),
    "ppo": Workload("ppo.toml", PPO, endless=True),
    "ppo_small": Workload("ppo.toml", PPO, endless=True, small=True),
}


@dataclass(frozen=True)
class Step:
    """When a step ended, and what its samples were."""

    time: float
    reward: float
    lengths: list[int]
    figures: dict[str, float] = field(default_factory=dict)
    """Rollcast's own, of `FIGURES`."""


class Meter:
    """CPU seconds and memory of all processes that carry a mark in their environment, once a second."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.rows: list[tuple[float, float]] = []
        self.peak_bytes = 0
        self._ended: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            used = 0
            for process in psutil.process_iter():
                try:
                    if process.environ().get(MARK) == self.mark:
                        times = process.cpu_times()
                        self._ended[process.pid] = times.user + times.system
                        used += process.memory_full_info().uss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak_bytes = max(self.peak_bytes, used)
            self.rows.append((time.time(), sum(self._ended.values())))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_at(self, moment: float) -> float:
        return min(self.rows, key=lambda row: abs(row[0] - moment))[1]


def measured(name: str, command: list[str], read: Callable[[str], dict[int, Step]], skipped: int) -> dict[str, Any]:
    """Runs `command` and makes the figures of its window."""
    meter = Meter(name)
    paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, MARK: name, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    output = subprocess.run(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout
    meter.stop()
    steps = read(output)
    window = [step for number, step in sorted(steps.items()) if number > skipped]
    seconds = window[-1].time - steps[skipped].time
    cpu = meter.cpu_at(window[-1].time) - meter.cpu_at(steps[skipped].time)
    lengths = np.array([length for step in window for length in step.lengths])
    told = {key for step in window for key in step.figures}
    own = {
        key: join([s.figures[key] for s in window if key in s.figures]) for key, join in FIGURES.items() if key in told
    }
    return {
        "samples_per_s": len(lengths) / seconds,
        "tokens_per_s": int(lengths.sum()) / seconds,
        "seconds_per_step": seconds / len(window),
        "cpu_seconds_per_sample": cpu / len(lengths),
        "peak_gib": meter.peak_bytes / 2**30,
        "steps": len(window),
        "samples": len(lengths),
        "tokens_per_sample": float(lengths.mean()),
        "tokens_p50": float(np.percentile(lengths, 50)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "tokens_max": int(lengths.max()),
        "tokens_cv": float(lengths.std() / lengths.mean()),
        "log_tokens_std": float(np.log(lengths).std()),
        "reward_first_step": window[0].reward,
        "reward_last_step": window[-1].reward,
        **own,
    }


def ours(name: str, workload: Workload, steps: int, folder: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "rollcast", "train", f"benchmarks/{workload.config}", "--run", name]
    command += ["--run.dir", str(folder), "--run.steps", str(steps), "--model.path", str(folder / "model"), *more]
    if workload.environment:
        command += ["--env.0.kwargs.questions", str(folder / "questions.jsonl")]

    def read(_: str) -> dict[int, Step]:
        run = folder / name
        found = {}
        for row in metrics.read(run / "metrics.jsonl"):
            if row["step"] == 0:
                continue
            played = list(records.read(run / "rollouts" / f"step_{row['step']}.jsonl"))
            lengths = [sum(sum(stream["trained"]) for stream in one["streams"]) for one in played]
            figures = {key: row[key] for key in FIGURES if key in row}
            found[row["step"]] = Step(row["time"], row["reward/mean"], lengths, figures)
        return found

    return measured(name, command, read, SKIPPED["rollcast"])


def peer(
    name: str, workload: Workload, script: tuple[str, ...], steps: int, python: str, folder: Path
) -> dict[str, Any]:
    command = [python, f"benchmarks/{script[0]}", *script[1:], "--model", str(folder / "model")]
    command += ["--questions", str(folder / "questions.jsonl"), "--steps", str(steps)]
    command += ["--samples", str(workload.samples)]

    def read(output: str) -> dict[int, Step]:
        rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"step"')]
        return {row["step"]: Step(row["time"], row["reward"], row["lengths"]) for row in rows}

    return measured(name, command, read, SKIPPED["peer"])


def prepare(workload: Workload, folder: Path) -> None:
    """The model and the questions that both sides are given."""
    write_questions(folder / "questions.jsonl")
    model = folder / "model"
    model.mkdir()
    for file in MODEL.iterdir():
        if file.suffix == ".safetensors":
            (model / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, model / file.name)
    if workload.small:
        write_small_weights(model)
    if workload.endless:
        never = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        number = next(token["id"] for token in never if token["content"] == NEVER_SAMPLED)
        _set(model / "tokenizer_config.json", "eos_token", NEVER_SAMPLED)
        _set(model / "config.json", "eos_token_id", number)
        _set(model / "generation_config.json", "eos_token_id", number)


def write_small_weights(model: Path) -> None:
    """20 million random weights in place of the 135 million: 8 layers x 256, and the same vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (model / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MODEL, **sizes, **heads)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)


def write_questions(path: Path) -> None:
    """As `rollcast/QA-v0` draws them, each once."""
    env: Any = gymnasium.make("rollcast/QA-v0")
    system = env.unwrapped.system_prompt
    asked = {}
    for seed in range(QUESTIONS):
        question, info = env.reset(seed=seed)
        asked[question] = {"system": system, "question": question, "references": info["references"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in asked.values()), encoding="utf-8")


def _set(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, key: value}), encoding="utf-8")


def ratios(pairs: list[dict[str, Any]], over: str, under: str) -> dict[str, Any]:
    """Of every pair the one side's figure over the other's: the median, and all of them."""
    found = {}
    for key in ("samples_per_s", "tokens_per_s", "cpu_seconds_per_sample", "peak_gib"):
        of_pairs = [pair[over][key] / pair[under][key] for pair in pairs]
        found[key] = {"median": statistics.median(of_pairs), "pairs": of_pairs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--peer-python", required=True, help="interpreter of an environment with trl (ppo: 1.12.0)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps of a rollcast run")
    parser.add_argument("--peer-steps", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="save to benchmarks/results/")
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workload]
    date = time.strftime("%Y-%m-%d")
    command = " ".join(["python", *sys.argv]).replace(arguments.peer_python, "TRL_ENV/bin/python")
    target = ROOT / "benchmarks" / "results" / f"end_to_end-{arguments.workload}-{date}.json"
    earlier = json.loads(target.read_text(encoding="utf-8"))["pairs"] if arguments.write and target.exists() else []
    pairs: list[dict[str, Any]] = list(earlier)
    for _ in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            prepare(workload, Path(folder))
            pair: dict[str, Any] = {"command": command, "load_before": os.getloadavg()[0]}
            mark = f"{os.getpid()}-{len(pairs)}"
            pair["rollcast"] = ours(f"rollcast-{mark}", workload, arguments.steps, Path(folder))
            for name, script in workload.peers.items():
                more = (f"{name}-{mark}", workload, script, arguments.peer_steps, arguments.peer_python, Path(folder))
                pair[name] = peer(*more)
        pairs.append(pair)
        result = {
            "benchmark": f"end_to_end {arguments.workload}",
            "command": command,
            "date": date,
            "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU",
            "ratios": {name: ratios(pairs, "rollcast", name) for name in workload.peers},
            "pairs": pairs,
        }
        print(json.dumps(pair | {"ratios": result["ratios"]}, indent=1), flush=True)
        if arguments.write:
            target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
