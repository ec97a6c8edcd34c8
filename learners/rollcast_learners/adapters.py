"""Low-rank adapters on a frozen model: LoRA (Hu et al. 2021, arXiv 2106.09685), through peft.

Owns: putting adapters into a model, switching them off, their names and their description in peft's folders, and adding
them to the weights they belong to. Does not know learners, engines or where files lie.

A weight W of the model becomes `W + alpha / rank * B A`; A and B alone are trained. B starts at zero, so that the first
policy is the model itself.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rollcast_learners.settings import LoraSettings

NAME = "default"
PREFIX = "base_model.model."
"""What peft puts before each name in its files."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def describe(settings: LoraSettings) -> str:
    """peft's adapter_config.json, as vLLM reads it too."""
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(settings.targets),
    }
    return json.dumps(described, indent=2) + "\n"


def inject(model: Any, settings: LoraSettings) -> None:
    """Puts adapters into `model` in place, in its own dtype; everything else of it is frozen.

    Raises `ValueError` when no layer has one of the names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets), lora_dropout=0.0, bias="none"
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # A is drawn: every learner must draw the same.
            inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        raise ValueError(
            f"no layer of the model is called {' or '.join(settings.targets)}. "
            f"Set lora.targets to some of {', '.join(sorted(linear))}."
        ) from error
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name
        parameter.requires_grad_(trained)
        if trained:  # peft makes them float32; the engine computes in the model's dtype, and so must the learner.
            parameter.data = parameter.data.to(next(model.parameters()).dtype)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before it had adapters, for as long as this lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters' tensors by their names in peft's files."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield published_name(name), parameter.detach()


def published_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.lora_A.default.weight` as peft writes it."""
    return PREFIX + name.replace(f".{NAME}.", ".")


def is_adapter(name: str) -> bool:
    return name.endswith((DOWN, UP))


def merged(
    weights: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """The model's weights by name, each with its adapter added; computed in float32, in the weight's dtype.

    `adapters` by their names in peft's files. Raises `ValueError` for an adapter without a weight.
    """
    left = {name.removeprefix(PREFIX).removesuffix(DOWN) for name in adapters if name.endswith(DOWN)}
    for name, weight in weights:
        layer = name.removesuffix(".weight")
        if layer not in left:
            yield name, weight
            continue
        left.discard(layer)
        down, up = (adapters[PREFIX + layer + end].to(weight.device, torch.float32) for end in (DOWN, UP))
        yield name, (weight.float() + scale * (up @ down)).to(weight.dtype)
    if left:
        raise ValueError(f"the model has no weight {sorted(left)[0]}.weight, to which an adapter belongs")


def bare_name(name: str) -> str:
    """A parameter's name in the model before it had adapters."""
    return name.replace(".base_layer.", ".")
