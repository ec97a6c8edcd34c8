"""How much better than expected each token was: generalised advantage estimation, and its normalisation.

Owns: advantages and returns of one sequence, whitening over a batch (also one spread over several learners),
and group-relative advantages. Does not know what a reward means, which tokens are masked, or who talks to
whom: data-parallel learners all-reduce `moments` themselves. Nothing here is differentiable: advantages are
data to the losses.

Legend for shapes: B sequences, T tokens of one sequence, N trained tokens of a batch, G groups.
"""

from itertools import accumulate

import torch
from torch import Tensor

EPSILON = 1e-8
"""Added to a standard deviation before dividing by it."""

NO_SPREAD = 1e-12
"""A variance below this share of the mean square is rounding noise, and not to be trained on."""


def gae(rewards_T: Tensor, values_T: Tensor, bootstrap_value: float, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of one sequence, by generalised advantage estimation (Schulman et al. 2015).

    `advantage_t = sum_k (gamma lam)^k delta_(t+k)` with `delta_t = reward_t + gamma value_(t+1) - value_t`,
    and `return_t = advantage_t + value_t`. `bootstrap_value` is the value after the last token: 0 where the
    episode ended, the critic's estimate where the environment cut it short. A non-finite reward or value
    reaches every earlier token: drop such sequences first (`guard.finite_sequences`).

    Deviation: computed in float64 whatever comes in, then cast back. The scan runs over plain numbers,
    because a scan over 0-d tensors costs microseconds a token and, on a GPU, a wait for each of them.
    """
    dtype = _checked_dtype(rewards_T, values_T)
    rewards_T, exact_T = (column_T.detach().to("cpu", torch.float64) for column_T in (rewards_T, values_T))
    next_values_T = torch.cat([exact_T, exact_T.new_tensor([bootstrap_value])])[1:]
    deltas_T = rewards_T + gamma * next_values_T - exact_T
    advantages_T = exact_T.new_tensor(_discounted_sums(deltas_T.tolist(), gamma * lam))
    returns_T = advantages_T + exact_T
    return advantages_T.to(values_T.device, dtype), returns_T.to(values_T.device, dtype)


def moments(advantages_N: Tensor) -> Tensor:
    """Count, sum and sum of squares, in float64: add them over micro-batches and learners, then `whiten`."""
    exact_N = advantages_N.detach().to(torch.float64)
    return torch.stack([exact_N.new_tensor(exact_N.numel()), exact_N.sum(), exact_N.square().sum()])


def whiten(advantages_N: Tensor, moments_3: Tensor | None = None) -> Tensor:
    """Mean 0 and standard deviation 1; zeros where there is no spread (one element, or all equal).

    `moments_3` are those of the global batch of which `advantages_N` is a part; without them, of
    `advantages_N`. The standard deviation is the population's (divided by count, not count - 1), so that it
    follows from sums.
    """
    count, total, squares = (moments(advantages_N) if moments_3 is None else moments_3).unbind()
    count = count.clamp(min=1)
    mean, mean_square = total / count, squares / count
    divisor = _divisor(mean_square - mean.square(), mean_square)
    return ((advantages_N.detach().to(torch.float64) - mean) / divisor).to(advantages_N.dtype)


def centre(advantages_N: Tensor, moments_3: Tensor | None = None) -> Tensor:
    """Mean 0, and the spread as it is: the baseline of plain REINFORCE (Williams 1992). `moments_3` as of `whiten`."""
    count, total, _ = (moments(advantages_N) if moments_3 is None else moments_3).unbind()
    return (advantages_N.detach().to(torch.float64) - total / count.clamp(min=1)).to(advantages_N.dtype)


def group_advantages(
    returns_B: Tensor, group_B: Tensor, weights_B: Tensor | None = None, *, scale: bool = True
) -> Tensor:
    """Each return centred and scaled by its group, as in GRPO (DeepSeekMath, Shao et al. 2024, section 4.1).

    Without `scale` only centred, as in Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2).

    `group_B` holds any whole numbers; equal ones are samples of one prompt. A group without spread (all
    samples equally good, or a single one) gets zeros: it says nothing about what to prefer. Token advantages
    are normalised by group with the same call, each token carrying the number of its group.

    Deviation: the population's standard deviation (the paper does not say which); common code divides by
    count - 1.
    """
    _check_same_length("group_B", group_B, "returns_B", returns_B)
    _, inverse_B = torch.unique(group_B, return_inverse=True)
    exact_B = returns_B.detach().to(torch.float64)
    weights_B = torch.ones_like(exact_B) if weights_B is None else weights_B.to(exact_B)
    centred_B = exact_B - _group_means(exact_B, inverse_B, weights_B)[inverse_B]
    if not scale:
        return centred_B.to(returns_B.dtype)
    variance_G = _group_means(centred_B.square(), inverse_B, weights_B)
    divisor_G = _divisor(variance_G, _group_means(exact_B.square(), inverse_B, weights_B))
    return (centred_B / divisor_G[inverse_B]).to(returns_B.dtype)


def leave_one_out(returns_E: Tensor, group_E: Tensor) -> Tensor:
    """The mean return of the *other* samples of each group: RLOO's baseline (Ahmadian et al. 2024).

    A sample alone in its group gets its own return: nothing says whether it was good.
    """
    _check_same_length("group_E", group_E, "returns_E", returns_E)
    _, inverse_E = torch.unique(group_E, return_inverse=True)
    exact_E = returns_E.detach().to(torch.float64)
    counts_E = torch.bincount(inverse_E)[inverse_E].to(torch.float64)
    totals_E = _group_means(exact_E, inverse_E, torch.ones_like(exact_E))[inverse_E] * counts_E
    baseline_E = torch.where(counts_E > 1, (totals_E - exact_E) / (counts_E - 1).clamp(min=1), exact_E)
    return baseline_E.to(returns_E.dtype)


def _discounted_sums(deltas: list[float], decay: float) -> list[float]:
    """`sums[t] = deltas[t] + decay * sums[t + 1]`: one scan from the end."""
    backwards = accumulate(reversed(deltas), lambda running, delta: delta + decay * running)
    return list(backwards)[::-1]


def _divisor(variance: Tensor, mean_square: Tensor) -> Tensor:
    """The standard deviation, or infinity where there is no spread: dividing by that gives zeros."""
    deviation = variance.clamp(min=0).sqrt() + EPSILON
    return torch.where(variance > NO_SPREAD * mean_square, deviation, torch.inf)


def _group_means(values_B: Tensor, inverse_B: Tensor, weights_B: Tensor) -> Tensor:
    groups = int(inverse_B.max()) + 1 if len(inverse_B) else 0
    sums_G = values_B.new_zeros(groups).index_add(0, inverse_B, values_B * weights_B)
    return sums_G / values_B.new_zeros(groups).index_add(0, inverse_B, weights_B)


def _checked_dtype(rewards_T: Tensor, values_T: Tensor) -> torch.dtype:
    _check_same_length("rewards_T", rewards_T, "values_T", values_T)
    dtype = torch.promote_types(rewards_T.dtype, values_T.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"rewards_T and values_T are {dtype}; advantages are fractions: pass floating-point tensors")
    return dtype


def _check_same_length(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.ndim != 1 or tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and {other_name} {tuple(other.shape)}; "
            "expected two 1-D tensors of one length: pass one sequence at a time, without padding"
        )
