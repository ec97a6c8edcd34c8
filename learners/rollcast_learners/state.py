"""What a learner needs to go on: safetensors and JSON in a folder, nothing pickled.

Owns: the files of one learner state. Does not know checkpoints' digests, steps of the run, or when to save.

    policy.safetensors      float32 masters of the language model, Hugging Face names
    critic.safetensors      the value head, and the critic's own trunk where it has one
    optimizer.safetensors   AdamW's moments, `exp_avg/NAME` and `exp_avg_sq/NAME`
    learner.json            counters, the guard, and the optimiser's step count

There is no random state to save: every draw is made from the run's seed and the step.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollcast_learners import adapters
from rollcast_learners.learner import PolicyLearner
from rollcast_learners.optimizer import MasterAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
POLICY, HEAD, TRUNK = "lm.", "value_head.", "value_trunk."


def save(learner: PolicyLearner, folder: Path) -> None:
    """Writes the four files into `folder`, which exists and is empty."""
    masters = _masters(learner.optimizer)
    critic = {name.removeprefix(HEAD): m for name, m in masters.items() if not name.startswith(POLICY)}
    policy = {name.removeprefix(POLICY): m for name, m in masters.items() if name.startswith(POLICY)}
    save_file(policy, folder / "policy.safetensors", metadata={"format": "pt"})
    save_file(critic, folder / "critic.safetensors")
    save_file(_moments(learner.optimizer), folder / "optimizer.safetensors")
    (folder / "learner.json").write_text(json.dumps(_scalars(learner), indent=2) + "\n", encoding="utf-8")


def load(learner: PolicyLearner, folder: Path) -> None:
    """Puts back what `save` wrote, into a learner of the same model.

    Raises `ValueError` naming the tensor when the state belongs to another model.
    """
    device = str(learner.policy.device)
    policy = load_file(folder / "policy.safetensors", device=device)
    critic = load_file(folder / "critic.safetensors", device=device)
    saved = {POLICY + k: v for k, v in policy.items()}
    saved |= {k if k.startswith(TRUNK) else HEAD + k: v for k, v in critic.items()}
    _copy(_masters(learner.optimizer), saved, folder)
    learner.optimizer.copy_to_policy()
    scalars = json.loads((folder / "learner.json").read_text(encoding="utf-8"))
    _load_moments(learner.optimizer, load_file(folder / "optimizer.safetensors", device=device), scalars, folder)
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


def _masters(optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {name: m.detach() for name, m in zip(optimizer.names, optimizer.masters, strict=True)}


def _moments(optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {
        f"{moment}/{name}": optimizer.adamw.state[master][moment]
        for name, master in zip(optimizer.names, optimizer.masters, strict=True)
        for moment in MOMENTS
        if master in optimizer.adamw.state
    }


def _scalars(learner: PolicyLearner) -> dict[str, Any]:
    state = learner.optimizer.adamw.state
    return {
        "steps_done": learner.steps_done,
        "rate_scale": learner.rate_scale,
        "kl_coef": learner.kl_coef,
        "guard": learner.guard.state(),
        "optimizer_step": max((int(s["step"]) for s in state.values()), default=0),
    }


@torch.no_grad()
def _copy(targets: dict[str, Tensor], saved: dict[str, Tensor], folder: Path) -> None:
    """All or nothing: every tensor is held against its target before the first one is copied."""
    for name in sorted(targets.keys() | saved.keys()):
        found, needed = (_shape(tensors, name) for tensors in (saved, targets))
        if found != needed:
            raise ValueError(
                f"{folder}: tensor {name} is {found} there, and {needed} in this model. "
                "Resume with the model.path the run was started with."
            )
    for name, target in targets.items():
        target.copy_(saved[name])


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "missing"


def _load_moments(optimizer: MasterAdamW, saved: dict[str, Tensor], scalars: dict[str, Any], folder: Path) -> None:
    step = int(scalars["optimizer_step"])
    optimizer.adamw.state.clear()
    if not step:
        return
    for master in optimizer.masters:
        optimizer.adamw.state[master] = {
            "step": torch.tensor(float(step), device=master.device),
            **{moment: torch.empty_like(master) for moment in MOMENTS},
        }
    _copy(_moments(optimizer), saved, folder)
