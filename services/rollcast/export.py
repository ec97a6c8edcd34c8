"""`rollcast export`: a policy as a plain Hugging Face folder, which transformers and vLLM load.

Owns: which saved policy is meant, and what such a folder holds. Does not know how a policy is saved (`checkpoint.py`,
`rollcast_learners.state`, `weights.py`) or who loads it.

The best policy is the one that `eval.best_metric` chose (`best.py`). Of the last, the newest whole checkpoint is taken:
its float32 masters, cast as they are when published; where no checkpoint is left, the published weights of the run
folder are. Everything but the tensors comes from the model that training began from. An adapter (LoRA) is written
twice: added to that model's tensors, and apart in the folder `adapter`, as peft reads it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollcast import best, checkpoint
from rollcast.checkpoint import Checkpoint
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.errors import ConfigError, RollcastError, RunFailed, UsageError
from rollcast.rundir import RunDir
from rollcast.runs import Source, read_json
from rollcast_learners.types import TensorEntry, Weights

Which = Literal["best", "last"]
Report = Callable[[str], None]

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.pt", "*.pth")
NOT_THE_POLICYS = (*WEIGHTS, "*.h5", "*.msgpack", "*.onnx", "README.md", ".*")
"""Files of a model folder that do not describe the policy: other weights, and the card of another model."""


@dataclass(frozen=True)
class Exported:
    """A folder that was written, and which policy it holds. `step` is None for published weights."""

    path: str
    run: str
    step: int | None
    policy_version: int


def settings_of(run: RunDir, overrides: Sequence[str] = ()) -> RunConfig:
    """The run's resolved configuration. Raises `ConfigError` when it cannot be read."""
    return load_config(run.config, overrides)


def export(source: Source, target: Path, which: Which | None, config: RunConfig, report: Report) -> Exported:
    """Writes the folder `target`, which is new or empty: whole, or not at all."""
    which = _which(source, which)
    _refuse_occupied(target)
    base = base_model(config)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        saved = _saved_policy(source, which, config, report)
        _write_tensors(saved.tensors, partial, config)
        _describe(base, partial)
        if config.model.chat_template is not None:
            shutil.copyfile(config.model.chat_template, partial / "chat_template.jinja")
        partial.rename(target)
    except OSError as error:
        fix = "Free that path, make room, or name another folder."
        raise UsageError(f"{target} cannot be written.", f"{type(error).__name__}: {error}", fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(str(target), source.run.path.name, saved.step, saved.version)


def base_model(config: RunConfig, weights: bool = False) -> Path:
    """The folder of the model that training began from; one of the hub is fetched, without its weights unless asked.

    Raises `ConfigError` when it is not there.
    """
    folder = Path(config.model.path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    from huggingface_hub import snapshot_download

    try:
        unwanted = [name for name in NOT_THE_POLICYS if not (weights and "safetensors" in name)]
        return Path(snapshot_download(config.model.path, ignore_patterns=unwanted))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: the model {config.model.path!r}, from which the run began, is not here",
            f"config.json and tokenizer come from it, and {os.getcwd()} is where it was looked for: {error}",
            "go to the folder in which training was started, or name the model's with --model.path",
        ) from error


def _which(source: Source, which: Which | None) -> Which:
    """What is meant: the best policy where one is kept, else the last. Raises `UsageError` for what there is not."""
    if which is not None and source.checkpoint is not None:
        why = f"{source.checkpoint} is one checkpoint already."
        raise UsageError("--which chooses among the checkpoints of a run.", why, "Leave --which out, or name the run.")
    kept = best.read(source.run)
    if which == "best" and kept is None:
        raise UsageError(
            f"The run {source.run.path.name} has no best checkpoint.",
            "None was recorded: no evaluation has chosen one.",
            "Use --which last, or name a checkpoint such as runs/NAME/checkpoints/step_10.",
        )
    if which is None:
        return "best" if kept is not None and source.checkpoint is None else "last"
    return which


def _refuse_occupied(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    why = "It holds files." if target.is_dir() else "It is a file."
    raise UsageError(f"{target} exists already.", f"{why} Nothing is overwritten.", "Name a new or an empty folder.")


# ---- the tensors


@dataclass(frozen=True, eq=False)
class SavedPolicy:
    """Tensors as they are published, the adapter's alone where one is; `step` is None for published weights."""

    tensors: dict[str, Any]
    step: int | None
    version: int


def _saved_policy(source: Source, which: Which, config: RunConfig, report: Report) -> SavedPolicy:
    kept = best.read(source.run)
    if which == "best" and kept is not None:
        return SavedPolicy(
            _published_tensors(read_published(source.run.best)), int(kept["step"]), int(kept["policy_version"])
        )
    found = _checkpoint_of(source, report)
    if found is None:
        weights = newest_published(source.run)
        if weights is None:
            raise _nothing_saved(source.run)
        return SavedPolicy(_published_tensors(weights), None, weights.version)
    from rollcast_learners.state import saved_policy

    tensors = saved_policy(found.path, _published_dtypes(source.run, config))
    return SavedPolicy(tensors, found.step, int(found.trainer["policy_version"]))


def _write_tensors(tensors: dict[str, Any], folder: Path, config: RunConfig) -> None:
    """Writes model.safetensors, and the folder `adapter` where the policy is one."""
    from safetensors.torch import save_file

    from rollcast_learners import adapters

    if any(adapters.is_adapter(name) for name in tensors):
        apart = folder / "adapter"
        apart.mkdir()
        save_file(tensors, apart / "adapter_model.safetensors", metadata={"format": "pt"})
        (apart / "adapter_config.json").write_text(adapters.describe(config.lora), encoding="utf-8")
        dtype = next(iter(tensors.values())).dtype
        whole = {name: tensor.to(dtype) for name, tensor in _base_tensors(base_model(config, weights=True)).items()}
        tensors = dict(adapters.merged(whole.items(), tensors, config.lora.scale))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _base_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a model folder. Raises `ConfigError` for one without safetensors."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        why = "the policy is an adapter, which is added to the model's own tensors"
        raise ConfigError(f"model.path: {folder} holds no *.safetensors", why, "name the folder with --model.path")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _checkpoint_of(source: Source, report: Report) -> Checkpoint | None:
    if source.checkpoint is None:
        return checkpoint.newest(source.run.checkpoints, report)
    try:
        return checkpoint.open_checkpoint(source.checkpoint)
    except ValueError as error:
        raise RunFailed("The checkpoint is not whole.", str(error), "Name another, or its run.") from error


def _published_dtypes(run: RunDir, config: RunConfig) -> Callable[[str], str]:
    """The dtype of each tensor when it was last published; before that, the one the model computes in here."""
    published = newest_published(run)
    if published is None:
        from rollcast.cluster import compute_dtype

        dtype = compute_dtype(config)
        return lambda _: dtype
    dtypes = {entry.name: entry.dtype for entry in published.manifest}
    usual = published.manifest[0].dtype  # Of an adapter that was published merged there is no entry.
    return lambda name: dtypes.get(name, usual)


def newest_published(run: RunDir) -> Weights | None:
    """The newest policy that lies published in the run folder."""
    folders = [
        path for path in run.weights.glob("v*") if path.name[1:].isdigit() and (path / "manifest.json").is_file()
    ]
    return read_published(max(folders, key=lambda path: int(path.name[1:]))) if folders else None


def read_published(folder: Path) -> Weights:
    """A policy as it lies published in a folder. Raises `RunFailed` when its manifest cannot be read."""
    manifest = read_json(folder / "manifest.json")
    try:
        entries = tuple(_entry(row) for row in manifest["tensors"])
        version, kind = int(manifest["version"]), manifest["kind"]
    except (KeyError, TypeError, ValueError) as error:
        why = f"Its manifest.json cannot be read: {type(error).__name__}: {error}"
        raise RunFailed(f"{folder} is damaged.", why, f"Remove {folder} and run the same command again.") from error
    from rollcast_learners.segments import segment_name

    count = 1 + max(entry.segment for entry in entries)
    return Weights(kind, version, entries, tuple(segment_name(version, i) for i in range(count)), "", str(folder))


def _entry(row: dict[str, Any]) -> TensorEntry:
    return TensorEntry(**{**row, "shape": tuple(row["shape"])})


def _published_tensors(weights: Weights) -> dict[str, Any]:
    from rollcast_learners.arena import open_tensors
    from rollcast_learners.segments import InvalidWeights, spec_of, validate

    try:
        validate(weights, weights.folder, [spec_of(entry) for entry in weights.manifest])
    except InvalidWeights as error:
        raise RunFailed(
            f"{weights.folder} is damaged.", str(error), "There is no other copy of this policy."
        ) from error
    return dict(open_tensors(weights, weights.folder))


def _nothing_saved(run: RunDir) -> RollcastError:
    return UsageError(
        f"The run {run.path.name} has saved no policy.",
        f"Neither {run.checkpoints} nor {run.weights} holds a whole one.",
        "Wait for its first checkpoint (checkpoint.every), or stop the run with SIGTERM: it saves one.",
    )


# ---- the rest of the folder


def _describe(base: Path, folder: Path) -> None:
    """Copies configuration, tokenizer and code of the base model; config.json tells the policy's dtype."""
    ignored = shutil.ignore_patterns(*NOT_THE_POLICYS)
    files = [path for path in base.iterdir() if path.is_file()]
    skipped = ignored(str(base), [path.name for path in files])
    for path in files:
        if path.name not in skipped:
            shutil.copyfile(path, folder / path.name)
    config = read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = _dtype_of(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # safetensors writes for the owner alone; who may read the folder may read its tensors.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _dtype_of(path: Path) -> str:
    """Of most bytes: some models keep a few tensors wider."""
    from rollcast_learners.segments import NAMES

    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    sizes: dict[str, int] = {}
    for entry in header.values():
        begin, end = entry["data_offsets"]
        sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return NAMES[max(sizes, key=sizes.__getitem__)]
