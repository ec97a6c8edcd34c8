"""End to end on `peer.toml`: rollcast and TRL's GRPOTrainer in turn on one machine, A B A B.

    python benchmarks/end_to_end.py --peer-python PATH/TO/TRL/ENV/bin/python --pairs 3 --write

Each run is timed from the end of its second step, so that neither side's start-up and first step count. CPU seconds are
those of the whole process tree in the same window; peak memory is the largest sum of unique memory (USS) seen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
SAMPLES_A_STEP = 64
SKIPPED_STEPS = 2
MARK = "ROLLCAST_BENCHMARK"


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


def measured(mark: str, command: list[str], steps: int, times_of: Any) -> dict[str, float]:
    meter = Meter(mark)
    environment = {**os.environ, MARK: mark, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout
    meter.stop()
    times = times_of(output)
    first, last = times[SKIPPED_STEPS], times[steps]
    samples = (steps - SKIPPED_STEPS) * SAMPLES_A_STEP
    return {
        "samples_per_s": samples / (last - first),
        "seconds_per_step": (last - first) / (steps - SKIPPED_STEPS),
        "cpu_seconds_per_sample": (meter.cpu_at(last) - meter.cpu_at(first)) / samples,
        "peak_gib": meter.peak_bytes / 2**30,
    }


def ours(name: str, steps: int, folder: Path, *more: str) -> dict[str, float]:
    command = [sys.executable, "-m", "rollcast", "train", "benchmarks/peer.toml", "--run", name]
    command += ["--run.dir", str(folder), "--run.steps", str(steps), *more]

    def times_of(_: str) -> dict[int, float]:
        rows = map(json.loads, (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return {row["step"]: row["time"] for row in rows}

    return measured(name, command, steps, times_of)


def peer(name: str, steps: int, python: str) -> dict[str, float]:
    command = [python, "benchmarks/trl_grpo.py", "--model", "models/smollm2-135m-instruct", "--steps", str(steps)]
    command += ["--facts", "envs/rollcast_envs/data/geography/facts.jsonl"]

    def times_of(output: str) -> dict[int, float]:
        rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"step"')]
        return {row["step"]: row["time"] for row in rows}

    return measured(name, command, steps, times_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="interpreter of an environment with trl==1.16.0")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of a rollcast run")
    parser.add_argument("--peer-steps", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="save to benchmarks/results/")
    arguments = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(arguments.pairs):
            load = os.getloadavg()[0]
            a = ours(f"rollcast-{pair}", arguments.steps, Path(folder))
            b = peer(f"trl-{pair}", arguments.peer_steps, arguments.peer_python)
            pairs.append({"load_before": load, "rollcast": a, "trl": b})
            print(json.dumps(pairs[-1]), flush=True)
    result = {
        "benchmark": "end_to_end",
        "command": " ".join(["python", *sys.argv]).replace(arguments.peer_python, "TRL_ENV/bin/python"),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU",
        "ratio_samples_per_s": statistics.median(
            p["rollcast"]["samples_per_s"] / p["trl"]["samples_per_s"] for p in pairs
        ),
        "ratio_cpu_seconds": statistics.median(
            p["rollcast"]["cpu_seconds_per_sample"] / p["trl"]["cpu_seconds_per_sample"] for p in pairs
        ),
        "pairs": pairs,
    }
    print(json.dumps(result, indent=2))
    if arguments.write:
        target = ROOT / "benchmarks" / "results" / f"end_to_end-{result['date']}.json"
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
