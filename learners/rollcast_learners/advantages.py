"""How much better than expected each token was: generalised advantage estimation, and its normalisation.

Owns: advantages and returns of one sequence, whitening over a batch (also one spread over several learners),
and group-relative advantages. Does not know what a reward means, which tokens are masked, or who talks to
whom: data-parallel learners all-reduce `moments` themselves. Nothing here is differentiable: advantages are
data to the losses.

Legend for shapes: B sequences, T tokens of one sequence, N trained tokens of a batch, E its episodes, G groups.
"""

import torch
from torch import Tensor

from rollcast_learners.losses import answers_of, discounted_sums, tokens_left

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

    Deviation: computed in float64 whatever comes in, then cast back.
    """
    length_1 = torch.full((1,), len(rewards_T), device=values_T.device)
    bootstrap_1 = torch.full((1,), bootstrap_value, dtype=torch.float64, device=values_T.device)
    return gae_of_episodes(rewards_T.to(values_T.device), values_T, bootstrap_1, length_1, gamma, lam)


def gae_of_episodes(
    rewards_N: Tensor, values_N: Tensor, bootstrap_E: Tensor, lengths_E: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` of E sequences at once, which lie one after the other, `lengths_E` tokens each. All on one device, for
    which nobody waits."""
    dtype = _checked_dtype(rewards_N, values_N)
    rewards_N, exact_N = (column_N.detach().to(torch.float64) for column_N in (rewards_N, values_N))
    at_the_end_N = tokens_left(lengths_E, len(exact_N)) == 0
    bootstrap_N = bootstrap_E.to(torch.float64)[answers_of(lengths_E, len(exact_N))]
    next_values_N = torch.where(at_the_end_N, bootstrap_N, exact_N.roll(-1))
    advantages_N = discounted_sums(rewards_N + gamma * next_values_N - exact_N, lengths_E, gamma * lam)
    return advantages_N.to(dtype), (advantages_N + exact_N).to(dtype)


def moments(values_N: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of the unmasked values, in float64: add them over micro-batches and learners, then
    `whiten`. What stands at masked places does not matter."""
    exact_N = values_N.detach().to(torch.float64)
    if mask_N is None:
        mask_N = torch.ones_like(exact_N, dtype=torch.bool)
    kept_N = torch.where(mask_N.bool(), exact_N, 0)
    return torch.stack([mask_N.to(torch.float64).sum(), kept_N.sum(), kept_N.square().sum()])


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
    returns_B: Tensor,
    group_B: Tensor,
    weights_B: Tensor | None = None,
    *,
    scale: bool = True,
    groups: int | None = None,
) -> Tensor:
    """Each return centred and scaled by its group, as in GRPO (DeepSeekMath, Shao et al. 2024, section 4.1).

    Without `scale` only centred, as in Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2).

    `group_B` holds any whole numbers; equal ones are samples of one prompt. With `groups` they are those from 0 to
    `groups` - 1, and nobody waits for the device to tell which there are. A group without spread (all samples equally
    good, or a single one) gets zeros: it says nothing about what to prefer. Token advantages are normalised by group
    with the same call, each token carrying the number of its group.

    Deviation: the population's standard deviation (the paper does not say which); common code divides by
    count - 1.
    """
    _check_same_length("group_B", group_B, "returns_B", returns_B)
    group_B, groups = _numbered(group_B, groups)
    exact_B = returns_B.detach().to(torch.float64)
    weights_B = torch.ones_like(exact_B) if weights_B is None else weights_B.to(exact_B)
    centred_B = exact_B - _group_means(exact_B, group_B, weights_B, groups)[group_B]
    if not scale:
        return centred_B.to(returns_B.dtype)
    variance_G = _group_means(centred_B.square(), group_B, weights_B, groups)
    divisor_G = _divisor(variance_G, _group_means(exact_B.square(), group_B, weights_B, groups))
    return (centred_B / divisor_G[group_B]).to(returns_B.dtype)


def leave_one_out(returns_E: Tensor, group_E: Tensor, groups: int | None = None) -> Tensor:
    """The mean return of the *other* samples of each group: RLOO's baseline (Ahmadian et al. 2024).

    A sample alone in its group gets its own return: nothing says whether it was good. `groups` as of
    `group_advantages`.
    """
    _check_same_length("group_E", group_E, "returns_E", returns_E)
    group_E, groups = _numbered(group_E, groups)
    exact_E = returns_E.detach().to(torch.float64)
    counts_E = _group_sums(torch.ones_like(exact_E), group_E, groups)[group_E]
    totals_E = _group_sums(exact_E, group_E, groups)[group_E]
    baseline_E = torch.where(counts_E > 1, (totals_E - exact_E) / (counts_E - 1).clamp(min=1), exact_E)
    return baseline_E.to(returns_E.dtype)


def _numbered(group_B: Tensor, groups: int | None) -> tuple[Tensor, int]:
    """Groups by numbers from 0, and how many there are."""
    if groups is not None:
        return group_B, groups
    found_G, inverse_B = torch.unique(group_B, return_inverse=True)
    return inverse_B, len(found_G)


def _divisor(variance: Tensor, mean_square: Tensor) -> Tensor:
    """The standard deviation, or infinity where there is no spread: dividing by that gives zeros."""
    deviation = variance.clamp(min=0).sqrt() + EPSILON
    return torch.where(variance > NO_SPREAD * mean_square, deviation, torch.inf)


def _group_means(values_B: Tensor, group_B: Tensor, weights_B: Tensor, groups: int) -> Tensor:
    return _group_sums(values_B * weights_B, group_B, groups) / _group_sums(weights_B, group_B, groups)


def _group_sums(values_B: Tensor, group_B: Tensor, groups: int) -> Tensor:
    return values_B.new_zeros(groups).index_add(0, group_B, values_B)


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
