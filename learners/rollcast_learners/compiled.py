"""Decoder layers through torch.compile: their many small operations become a few.

Owns: what of a model is compiled, and what compiling needs. Does not know models by name, losses or learners.

Each layer's own `forward` is compiled, in two parts: before attention and after it. Attention stays the call that it
is, since it reads tables that are different for every micro-batch. What wraps a layer stays outside: activation
checkpointing and FSDP2's gathering. All layers share what was compiled, batches of any length too.

A compiled layer rounds less often in bfloat16: what is fused stays in float32 in between.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

FORMS = 64
"""How many forms of a layer may be compiled: with and without gradients, one row or more, with adapters or without."""


def compile_layers(model: nn.Module, path: str) -> None:
    """Compiles every decoder layer of `model` when it is first called: seconds on a CPU, once a process.

    Raises `ValueError` where there is no C++ compiler, or the model has no layers that are known as such.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"layers cannot be compiled: there is no C++ compiler {compiler!r} here. "
            "Install one (Debian: apt install g++), name it in CXX, or set learner.compile to false."
        )
    layers = list(_layers(model))
    if not layers:
        raise ValueError(f"model {path!r} has no layers that can be compiled. Set learner.compile to false.")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, recompile_limit=FORMS)  # type: ignore[call-overload]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The layers as they were written, for as long as this lasts: for comparisons."""
    kept: list[tuple[Any, Any]] = [(layer, layer.__dict__.pop("forward")) for layer in _layers(model)]
    try:
        yield
    finally:
        for layer, forward in kept:
            layer.forward = forward


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
