"""What a learner needs to go on: safetensors and JSON in a folder, nothing pickled.

Owns: the files of one learner state. Does not know checkpoints' digests, steps of the run, or when to save.

    policy.safetensors      float32 masters of the language model, Hugging Face names
    critic.safetensors      the value head, and the critic's own trunk where it has one
    optimizer.safetensors   AdamW's moments, `exp_avg/NAME` and `exp_avg_sq/NAME`
    learner.json            counters, the guard, and the optimiser's step count

There is no random state to save: every draw is made from the run's seed and the step. The files are the same however
many learners there are and whether they share the policy out: a sharded one is gathered and written a tensor at a time,
and each rank reads the rows that are its own.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rollcast_learners import adapters, sharding
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.optimizer import MasterAdamW
from rollcast_learners.segments import TensorSpec, layout

MOMENTS = ("exp_avg", "exp_avg_sq")
POLICY, HEAD = "lm.", "value_head."
Tensors = dict[str, tuple[Tensor, Tensor]]
"""By the name in the file: a weight of the policy, and what is saved of it, a master or a moment (the rows here)."""


def save(learner: PolicyLearner, folder: Path) -> None:
    """Writes the four files into `folder`, which exists and is empty.

    All ranks of a sharded policy call it together, and the first one writes.
    """
    files = _weights(learner.optimizer) | _moments(learner.optimizer)
    with sharding.in_step(_gathered(files)) as gathered:
        if sharding.writes(learner.policy):
            for name, tensors in files.items():
                _write(folder / name, tensors, islice(gathered, len(tensors)))
            scalars = json.dumps(_scalars(learner), indent=2) + "\n"
            (folder / "learner.json").write_text(scalars, encoding="utf-8")


def load(learner: PolicyLearner, folder: Path) -> None:
    """Puts back what `save` wrote, into a learner of the same model.

    Raises `ValueError` naming the tensor when the state belongs to another model.
    """
    scalars = json.loads((folder / "learner.json").read_text(encoding="utf-8"))
    _read(_weights(learner.optimizer), folder)
    learner.optimizer.copy_to_policy()
    _make_moments(learner.optimizer, int(scalars["optimizer_step"]))
    if scalars["optimizer_step"]:
        _read(_moments(learner.optimizer), folder)
    learner.steps_done = int(scalars["steps_done"])
    learner.rate_scale = float(scalars["rate_scale"])
    learner.kl_coef = float(scalars.get("kl_coef", learner.kl_coef))
    learner.guard.load(scalars["guard"])


def saved_policy(folder: Path, dtype_of: Callable[[str], str]) -> dict[str, Tensor]:
    """The policy of a saved state as it is published, each tensor in the dtype that its name is given.

    Of a policy with adapters, these alone, by the names of peft's files.
    """
    found: dict[str, Tensor] = {}
    with safe_open(folder / "policy.safetensors", "pt") as saved:
        # One by one, so that the masters are never in memory all at once.
        for name in sorted(saved.keys()):
            known_as = adapters.published_name(name) if ".lora_" in name else name
            found[known_as] = saved.get_tensor(name).to(getattr(torch, dtype_of(known_as)))
    return found


def _weights(optimizer: MasterAdamW) -> dict[str, Tensors]:
    policy: Tensors = {}
    critic: Tensors = {}
    for name, weight, master in zip(optimizer.names, optimizer.parameters, optimizer.masters, strict=True):
        belongs_to, known_as = (policy, POLICY) if name.startswith(POLICY) else (critic, HEAD)
        belongs_to[name.removeprefix(known_as)] = weight, master
    return {"policy.safetensors": policy, "critic.safetensors": critic}


def _moments(optimizer: MasterAdamW) -> dict[str, Tensors]:
    moments: Tensors = {
        f"{moment}/{name}": (weight, optimizer.adamw.state[master][moment])
        for name, weight, master in zip(optimizer.names, optimizer.parameters, optimizer.masters, strict=True)
        for moment in MOMENTS
        if master in optimizer.adamw.state
    }
    return {"optimizer.safetensors": moments}


def _gathered(files: dict[str, Tensors]) -> Iterator[Tensor]:
    for tensors in files.values():
        for weight, rows in tensors.values():
            yield sharding.whole(weight, rows)


def _write(path: Path, tensors: Tensors, gathered: Iterator[Tensor]) -> None:
    """A safetensors file of float32, as the tensors come in."""
    specs = [TensorSpec(name, "float32", tuple(weight.shape)) for name, (weight, _) in tensors.items()]
    with path.open("wb") as file:
        file.write(layout(specs).header)
        for tensor in gathered:
            file.write(tensor.cpu().numpy().data)


@torch.no_grad()
def _read(files: dict[str, Tensors], folder: Path) -> None:
    """All or nothing: every tensor is held against its target before the first one is copied."""
    for file, tensors in files.items():
        with safe_open(folder / file, "pt") as saved:
            shapes = {name: str(tuple(saved.get_slice(name).get_shape())) for name in sorted(saved.keys())}
            _check(shapes, tensors, folder)
    for file, tensors in files.items():
        with safe_open(folder / file, "pt") as saved:
            for name, (weight, rows) in tensors.items():
                rows.copy_(saved.get_slice(name)[sharding.rows_of(weight)])


def _check(found: dict[str, str], needed: Tensors, folder: Path) -> None:
    shapes = {name: str(tuple(weight.shape)) for name, (weight, _) in needed.items()}
    for name in sorted(shapes.keys() | found.keys()):
        there, here = found.get(name, "missing"), shapes.get(name, "missing")
        if there != here:
            raise ValueError(
                f"{folder}: tensor {name} is {there} there, and {here} in this model. "
                "Resume with the model.path the run was started with."
            )


def _scalars(learner: PolicyLearner) -> dict[str, Any]:
    state = learner.optimizer.adamw.state
    return {
        "steps_done": learner.steps_done,
        "rate_scale": learner.rate_scale,
        "kl_coef": learner.kl_coef,
        "guard": learner.guard.state(),
        "optimizer_step": max((int(s["step"]) for s in state.values()), default=0),
    }


def _make_moments(optimizer: MasterAdamW, step: int) -> None:
    optimizer.adamw.state.clear()
    for master in optimizer.masters if step else ():
        optimizer.adamw.state[master] = {
            "step": torch.tensor(float(step), device=master.device),
            **{moment: torch.empty_like(master) for moment in MOMENTS},
        }
