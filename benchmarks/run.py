"""`make bench`: every benchmark, one after the other, results in benchmarks/results/.

The peers (two versions of TRL) get environments of their own, `.venv-trl` and `.venv-trl-ppo`, the first time. Run it
on a quiet machine: each result records the load average it met.
"""

import subprocess
import sys
from pathlib import Path

from rollcast.demo import prepare_model

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
PEERS = {
    ".venv-trl": ["trl==1.16.0", "transformers==5.19.0", "datasets", "accelerate", "gymnasium==1.2.2"],
    ".venv-trl-ppo": ["trl==1.12.0", "transformers==5.19.0", "datasets", "accelerate"],
}
END_TO_END = {
    "natural": ".venv-trl",
    "fixed": ".venv-trl",
    "lognormal": ".venv-trl",
    "multiturn": ".venv-trl",
    "multiturn_small": ".venv-trl",
    "rloo": ".venv-trl",
    "ppo": ".venv-trl-ppo",
    "ppo_small": ".venv-trl-ppo",
}
"""Workload -> the environment its peer runs in."""


def peer_python(name: str) -> str:
    folder = ROOT / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        if subprocess.run([*pip, f"{TORCH}+cpu"]).returncode:
            subprocess.run([*pip, "--index-url", "https://download.pytorch.org/whl/cpu", f"{TORCH}+cpu"], check=True)
        subprocess.run([*pip, *PEERS[name]], check=True)
        (folder / ".ready").touch()
    return str(python)


def main() -> None:
    prepare_model(ROOT / "models" / "smollm2-135m-instruct")
    end_to_end = [
        ["end_to_end.py", workload, "--peer-python", peer_python(name)] for workload, name in END_TO_END.items()
    ]
    learner = [["learner.py"], ["learner_scaling.py"], ["head.py"], ["packing.py"]]
    for script, *more in (["weights.py"], ["serving.py"], *learner, ["asynchrony.py"], ["tasks.py"], *end_to_end):
        print("==", script, *more[:1], flush=True)
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--write", *more], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
