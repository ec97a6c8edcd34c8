"""One policy for all learners: each keeps its rows of every weight, and has a layer whole while it computes with it.

Owns: FSDP2 (PyTorch's `fully_shard`; Zhao et al. 2023, arXiv 2304.11277) and what follows from it: which weights are
gathered together, how gradients are summed, taking a weight apart and putting it together, and how many passes the
ranks make. Does not know models by name, losses, optimisers, files or Ray.

What is sharded is the float32 master of a weight. FSDP2 casts it to the compute dtype as it gathers it, and sums the
gradients of all ranks in float32 into the rows that are here: so no rank holds another copy of either, and a policy
whose masters and moments do not fit one device fits several. Gradients are sums, not averages: the losses are sums
already, and the optimiser divides by the count over all ranks.

Every pass gathers, so every rank makes as many passes as the others: `most` agrees on the number.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

T = TypeVar("T")


def shard(
    module: nn.Module, dtype: torch.dtype, device: torch.device, replicated: nn.Module, methods: Iterable[str]
) -> None:
    """Leaves this rank its rows of each weight of `module`, on `device`; all ranks call it together.

    `dtype` is what passes compute in. `replicated`, a part too small to spread, stays whole on every rank. `methods`
    make passes too, besides `forward`. Raises `ValueError` without other ranks.
    """
    group = dist.group.WORLD
    if group is None:
        raise ValueError(
            "a policy is sharded over several learners, and this one is alone. "
            'Set learner.num_learners to 2 or more, or learner.sharding to "none".'
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP2 is told a kind of device, and takes the current one.
    mesh = DeviceMesh.from_group(group, device.type)
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    apart = set(replicated.parameters())
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for part in (*layers, module):  # One layer after the other, so that only one at a time is whole in float32.
        _trained_in_float32(part, apart)
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precision, ignored_params=apart)
        sharded.set_force_sum_reduction_for_comms(True)  # Gloo knows neither averages nor scaled sums.
        sharded.set_gradient_divide_factor(1.0)
    replicated.to(device)
    for method in methods:
        register_fsdp_forward_method(module, method)


def _trained_in_float32(part: nn.Module, apart: set[nn.Parameter]) -> None:
    for parameter in part.parameters():
        if parameter.requires_grad and parameter not in apart and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def is_spread(weight: Tensor) -> bool:
    return isinstance(weight, DTensor)


def local(weight: Tensor) -> Tensor:
    """The rows of `weight` that are here, sharing its memory; all of it where it is not sharded."""
    detached = weight.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def rows_of(weight: Tensor) -> slice:
    """Which rows of the whole weight `local` gives. FSDP2 cuts as `torch.chunk` does: the last ranks may have none."""
    length = len(weight)
    if not isinstance(weight, DTensor):
        return slice(0, length)
    size = -(-length // weight.device_mesh.size())
    start = min(weight.device_mesh.get_local_rank() * size, length)
    return slice(start, min(start + size, length))


def whole(weight: Tensor, rows: Tensor | None = None) -> Tensor:
    """`weight` put together on every rank, or what belongs to it (a moment), of which `rows` are here.

    Of a sharded weight all ranks call it together. One that is not sharded is handed back as it is.
    """
    if not isinstance(weight, DTensor):
        return weight if rows is None else rows
    gathered: Tensor = like(local(weight) if rows is None else rows, weight).full_tensor()  # type: ignore[attr-defined]
    return gathered


def like(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows` in the clothes of `weight`: sharded as it is, on the same memory."""
    if not isinstance(weight, DTensor):
        return rows
    placed = weight.device_mesh, weight.placements
    return DTensor.from_local(rows, *placed, run_check=False, shape=weight.shape, stride=weight.stride())


def most(module: nn.Module, count: int) -> int:
    """The largest `count` of all ranks of a sharded module; of any other, its own: nobody waits for it."""
    if not is_sharded(module):
        return count
    device = next(module.parameters()).device
    agreed = torch.tensor(count, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return int(agreed)


@contextmanager
def in_step(gathering: Iterator[T]) -> Iterator[Iterator[T]]:
    """What `gathering` gives, to its end: all ranks take part also in what one that cannot go on leaves over."""
    try:
        yield gathering
    finally:
        for _ in gathering:
            pass


def writes(module: nn.Module) -> bool:
    """Whether this rank is the one that writes files: all do who are not sharded, else the first."""
    return not is_sharded(module) or dist.get_rank() == 0
