"""What the learner minimises: the clipped policy loss, the clipped value loss, and estimates of KL.

Owns: the formulas, from per-token tensors to `(loss, metrics)`. Does not know models, optimisers, packing or
processes.

Every loss is a sum over its unmasked tokens divided by `total_tokens`, the number of trained tokens of the
*whole* optimiser step over all micro-batches and all learners. So losses, gradients and metrics of
micro-batches simply add up, whatever the packing; learners add their gradients (sum, not mean). Metrics are
0-d detached tensors that add up alike: fractions and means are already divided by `total_tokens`, counts are
plain.

What stands at masked positions does not matter, not even NaN: it is replaced before any arithmetic, because a
NaN times a zero mask is still NaN, in the gradient too. What is non-finite at an unmasked position stays
visible in the loss, for the numeric guard to skip the step. Reductions happen in the dtype that comes in:
pass float32, as `head` returns.

Legend for shapes: T tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Metrics = dict[str, Tensor]

LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: far beyond any clip, far below overflow. Beyond it a token passes no gradient."""


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    clip_low: float,
    clip_high: float,
    total_tokens: int | float | Tensor,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), `-min(r A, clip(r, 1 - low, 1 + high) A)`.

    `old_logprobs_T` are the sampler's own (behaviour policy). The clip is asymmetric and the mean runs over
    tokens, not over answers, as in DAPO (Yu et al. 2025: clip-higher, token-level loss). Deviation from both:
    the log-ratio is clamped to +-20 before exp.

    Metrics: `clip_fraction`, tokens whose gradient the clip removed (not merely those outside the range);
    `kl/behaviour`, KL(behaviour || policy) by k3; `clamped`, the count of clamped log-ratios.
    """
    mask_T = mask_T.bool()
    advantages_T = _zero_where_masked(advantages_T.detach(), mask_T)
    logprobs_T = _zero_where_masked(logprobs_T, mask_T)
    old_logprobs_T = _zero_where_masked(old_logprobs_T.detach(), mask_T)
    ratio_T = _log_ratio(logprobs_T, old_logprobs_T).exp()
    plain_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    loss = -token_mean(torch.minimum(plain_T, clipped_T), mask_T, total_tokens)
    with torch.no_grad():
        excess_T = (logprobs_T - old_logprobs_T).abs() > LOG_RATIO_LIMIT
        metrics = {
            "clip_fraction": token_mean((clipped_T < plain_T).to(loss.dtype), mask_T, total_tokens),
            "kl/behaviour": token_mean(kl("k3", old_logprobs_T, logprobs_T), mask_T, total_tokens),
            "clamped": excess_T.sum().to(loss.dtype),
        }
    return loss, metrics


def value_loss(
    values_T: Tensor,
    old_values_T: Tensor,
    returns_T: Tensor,
    mask_T: Tensor,
    clip: float | None,
    total_tokens: int | float | Tensor,
) -> tuple[Tensor, Metrics]:
    """Half the squared error of the critic, clipped as in PPO2 (OpenAI Baselines; not in the paper).

    With a clip, the larger of the errors of the value and of the value held within `clip` of `old_values_T`;
    None switches it off. The half makes the gradient the error itself.

    Metrics: `value_clip_fraction`, tokens at which the clipped error was the larger one.
    """
    mask_T = mask_T.bool()
    returns_T = _zero_where_masked(returns_T.detach(), mask_T)
    values_T = _zero_where_masked(values_T, mask_T)
    error_T = plain_T = 0.5 * (values_T - returns_T).square()
    if clip is not None:
        old_values_T = _zero_where_masked(old_values_T.detach(), mask_T)
        held_T = values_T.clamp(old_values_T - clip, old_values_T + clip)
        error_T = torch.maximum(plain_T, 0.5 * (held_T - returns_T).square())
    loss = token_mean(error_T, mask_T, total_tokens)
    bound_T = (error_T > plain_T).to(loss.dtype).detach()
    return loss, {"value_clip_fraction": token_mean(bound_T, mask_T, total_tokens)}


def kl(kind: str, logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || other), for tokens sampled from the policy.

    Schulman 2020, "Approximating KL divergence". With `d = log policy - log other`: k1 is `d` (unbiased, any
    sign), k2 is `d^2 / 2` (biased, never negative), k3 is `exp(-d) - 1 + d` (unbiased, never negative). As a
    *loss*, only k2 has the gradient of this KL in expectation; the mean gradient of k1 is zero and that of k3
    belongs to KL(other || policy). As a reward, use k1 or k3.

    Deviation: `d` is clamped to +-20, so that no token is worth more than that, nor overflows in k3.
    """
    if kind not in _KL_ESTIMATES:
        known = ", ".join(_KL_ESTIMATES)
        raise ValueError(f"kl kind is {kind!r}; expected one of {known}: set kl.kind to one of these")
    return _KL_ESTIMATES[kind](_log_ratio(logprobs_T, other_logprobs_T))


def token_mean(values_T: Tensor, mask_T: Tensor, total_tokens: int | float | Tensor) -> Tensor:
    """Unmasked sum over the global count, as of the entropy (subtract: a bonus) or of `kl` (add: a loss).

    A count of 0 (nothing to train on) gives 0, not a division by zero.
    """
    if isinstance(total_tokens, Tensor):
        count: float | Tensor = total_tokens.clamp(min=1)
    else:
        count = max(total_tokens, 1)
    return _zero_where_masked(values_T, mask_T.bool()).sum() / count


_KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda difference_T: difference_T,
    "k2": lambda difference_T: 0.5 * difference_T.square(),
    "k3": lambda difference_T: torch.expm1(-difference_T) + difference_T,
}


def _log_ratio(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    return (logprobs_T - other_logprobs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _zero_where_masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_T, 0)
