"""`make bench`: every benchmark, one after the other, results in benchmarks/results/.

The peer (TRL) gets an environment of its own, `.venv-trl`, the first time. Run it on a quiet machine: each result
records the load average it met.
"""

import subprocess
import sys
from pathlib import Path

from rollcast.demo import prepare_model

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-trl"
TORCH = "torch==2.13.0"
PEER_PACKAGES = ["trl==1.16.0", "transformers==5.19.0", "datasets", "accelerate"]


def peer_python() -> str:
    python = PEER / "bin" / "python"
    if not (PEER / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        if subprocess.run([*pip, f"{TORCH}+cpu"]).returncode:
            subprocess.run([*pip, "--index-url", "https://download.pytorch.org/whl/cpu", f"{TORCH}+cpu"], check=True)
        subprocess.run([*pip, *PEER_PACKAGES], check=True)
        (PEER / ".ready").touch()
    return str(python)


def main() -> None:
    prepare_model(ROOT / "models" / "smollm2-135m-instruct")
    for script, *more in (
        ["weights.py"],
        ["learner.py"],
        ["learner_scaling.py"],
        ["tasks.py"],
        ["end_to_end.py", "--peer-python", peer_python()],
    ):
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--write", *more], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
