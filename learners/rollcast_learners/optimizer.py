"""AdamW over float32 master weights, with every gradient in one flat buffer.

Owns: master weights, the gradient buffer, learning rates and their schedule. Does not know losses, batches or
how many learners there are: `reduce` is handed in.

One flat buffer means one all-reduce an optimiser step carries gradients, their count and finite flag
together. Of a sharded policy (`sharding.py`) masters, moments and gradients are those of the rows that are here: the
gradients arrive summed over all learners, and only what stays whole on each is left to be reduced. Nothing here waits
for the device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rollcast_learners import sharding
from rollcast_learners.policy import Policy
from rollcast_learners.settings import LearnerSettings

Reduce = Callable[[Tensor], None]
"""Sums a tensor over all learners, in place."""


def rate_factor(settings: LearnerSettings, step: int, total_steps: int) -> float:
    """What both learning rates are multiplied with in `step` (counted from 0)."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(total_steps - settings.warmup_steps, 1)
    done = min(done, 1.0)
    if settings.lr_schedule == "linear":
        return 1.0 - done
    if settings.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


CRITIC = ("value_head.", "value_trunk.")
"""What belongs to the critic, by name: it has a learning rate of its own."""


class MasterAdamW:
    """Accumulates gradients in float32, steps the masters, copies them to the policy in its own dtype."""

    def __init__(self, policy: Policy, settings: LearnerSettings) -> None:
        named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        # What is summed already comes first in the flat buffer, so that the rest can be reduced in one piece.
        named.sort(key=lambda pair: not sharding.is_spread(pair[1]))
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        # In float32 a parameter is its own master, and autograd (or FSDP2) adds its gradients up in the buffer.
        self.masters = [p.float() for p in map(sharding.local, self.parameters)]
        count = sum(m.numel() for m in self.masters)
        self.sharded = sharding.is_sharded(policy)
        self.spread = sum(sharding.local(p).numel() for p in self.parameters if sharding.is_spread(p))
        self.flat = torch.zeros(count + 1, device=policy.device)
        views = self.flat[:count].split_with_sizes([m.numel() for m in self.masters])
        self.grads = [view.view_as(m) for view, m in zip(views, self.masters, strict=True)]
        critic = [m for n, m in zip(self.names, self.masters, strict=True) if n.startswith(CRITIC)]
        policy_masters = [m for n, m in zip(self.names, self.masters, strict=True) if not n.startswith(CRITIC)]
        self.adamw = torch.optim.AdamW(
            [
                {"params": policy_masters, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
                {"params": critic, "lr": settings.value_learning_rate, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )
        self.base_rates = (settings.learning_rate, settings.value_learning_rate)
        self.clear()

    def clear(self) -> None:
        """Forgets all gradients."""
        self.flat.zero_()
        for parameter, master, grad in zip(self.parameters, self.masters, self.grads, strict=True):
            master.grad = grad
            parameter.grad = sharding.like(grad, parameter) if parameter.dtype == torch.float32 else None

    def accumulate(self, count: int) -> None:
        """Adds what the last backward pass left on the policy, a sum over `count` tokens or answers."""
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            if parameter.dtype != torch.float32 and parameter.grad is not None:
                grad.add_(parameter.grad)
                parameter.grad = None
        self.flat[-1] += count

    def reduce(self, reduce: Reduce) -> Tensor:
        """Sums over the learners, divides by the count; gradient norm and count, on the device. NaN if any was."""
        reduce(self.flat[self.spread :])
        count = self.flat[-1].clone()
        self.flat[:-1].div_(count.clamp(min=1.0))
        return torch.stack([self._norm(reduce), count.double()])

    def _norm(self, reduce: Reduce) -> Tensor:
        """Of all gradients, on whichever rank they lie. In float64, in which no square overflows."""
        squares = torch.linalg.vector_norm(self.flat[: self.spread]).double().square()
        if self.sharded:
            reduce(squares)
        norm: Tensor = (squares + torch.linalg.vector_norm(self.flat[self.spread : -1]).double().square()).sqrt()
        return norm

    def step(self, norm: float, grad_clip: float, rate_factor: float, critic_only: bool = False) -> None:
        """Clips and steps; with `critic_only` the language model stays as it is, weight decay included."""
        if norm > grad_clip:
            self.flat[:-1].mul_(grad_clip / norm)
        trunk_rate, head_rate = self.base_rates
        rates = (0.0 if critic_only else trunk_rate * rate_factor, head_rate * rate_factor)
        for group, rate in zip(self.adamw.param_groups, rates, strict=True):
            group["lr"] = rate
        self.adamw.step()
        self.copy_to_policy()

    @torch.no_grad()
    def copy_to_policy(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != torch.float32:
                parameter.copy_(master)
