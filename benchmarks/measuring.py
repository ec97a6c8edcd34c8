"""What the benchmarks share: which machine it was, fresh processes, peak memory, turns, and where results go.

Does not know what is measured.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2


def machine(threads: int = THREADS) -> dict[str, Any]:
    """When, with which command, on what, and how busy it was."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": {"cores": os.cpu_count(), "processor": processor(), "threads": threads},
        "load_average_before": os.getloadavg()[0],
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def child(script: str, *arguments: str) -> Any:
    """What a fresh process printed last, as JSON: its peak memory is its own, and its threads sleep while they wait."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, script, *arguments]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def peak_mib() -> int:
    """Largest resident memory of this process so far."""
    return _memory_mib("VmHWM")


def resident_mib() -> int:
    return _memory_mib("VmRSS")


def _memory_mib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


class Turns:
    """Sides that take turns, A B A B. The first round is left out: it allocates, and warms the caches.

    `cpu_seconds` tells those of a side so far, where they fall in other processes than this one.
    """

    def __init__(
        self,
        sides: dict[str, Callable[[], Any]],
        pairs: int,
        cpu_seconds: Callable[[str], float] = lambda _: time.process_time(),
    ) -> None:
        self.wall: dict[str, list[float]] = {name: [] for name in sides}
        self.cpu: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(pairs + 1):
            for name, once in sides.items():
                began_cpu, began = cpu_seconds(name), time.perf_counter()
                once()
                self.wall[name].append(time.perf_counter() - began)
                self.cpu[name].append(cpu_seconds(name) - began_cpu)

    def seconds(self) -> dict[str, dict[str, float]]:
        return {
            "wall_s": {name: round(median(times[1:]), 3) for name, times in self.wall.items()},
            "cpu_s": {name: round(median(times[1:]), 3) for name, times in self.cpu.items()},
        }

    def ratio(self, over: str, under: str) -> dict[str, Any]:
        """`over`'s seconds over `under`'s: median and all pairs of the wall clock, median of the CPU."""
        wall, cpu = (
            [a / b for a, b in zip(times[over][1:], times[under][1:], strict=True)] for times in (self.wall, self.cpu)
        )
        return {
            "median": round(median(wall), 3),
            "pairs": [round(ratio, 3) for ratio in wall],
            "cpu_seconds": round(median(cpu), 3),
        }


def finish(name: str, figures: dict[str, Any], write: bool) -> None:
    """Prints the figures, and with `write` keeps them in benchmarks/results/."""
    text = json.dumps(figures, indent=2)
    print(text, flush=True)
    if write:
        target = ROOT / "benchmarks" / "results" / f"{name}-{time.strftime('%Y-%m-%d')}.json"
        target.write_text(text + "\n", encoding="utf-8")
