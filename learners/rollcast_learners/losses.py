"""What the learner minimises: one policy loss for each kind of algorithm, the value loss, and estimates of KL.

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
    *,
    dual_clip: float | None = None,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), `-min(r A, clip(r, 1 - low, 1 + high) A)`.

    `old_logprobs_T` are of the policy the ratio is measured from: the sampler's own, or with an off-policy correction
    those at the beginning of the step (decoupled PPO). The clip is asymmetric and the mean runs over tokens, not over
    answers, as in DAPO (Yu et al. 2025: clip-higher, token-level loss). `dual_clip` bounds what a token with a negative
    advantage can cost at `dual_clip |A|` (Ye et al. 2020, arXiv 1912.09729). `weights_T` multiply each
    token's term. Deviation from all: the log-ratio is clamped to +-20 before exp.

    Metrics: `clip_fraction`, tokens whose gradient a clip removed (not merely those outside the range);
    `kl/behaviour`, KL(old policy || policy) by k3; `clamped`, the count of clamped log-ratios.
    """
    mask_T, logprobs_T, old_logprobs_T, advantages_T = _cleared(mask_T, logprobs_T, old_logprobs_T, advantages_T)
    ratio_T = _log_ratio(logprobs_T, old_logprobs_T).exp()
    worth_T, clipped_T = _clipped_worth(ratio_T, advantages_T, clip_low, clip_high, dual_clip)
    loss = -token_mean(_weighted(worth_T, weights_T), mask_T, total_tokens)
    return loss, _ratio_metrics(logprobs_T, old_logprobs_T, mask_T, total_tokens, clipped_T)


def score_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    total_tokens: int | float | Tensor,
    *,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The plain policy gradient, `-A log p` (Williams 1992, REINFORCE; the actor of A2C; RLOO).

    `old_logprobs_T` are for the metrics alone: without `weights_T` the loss takes every sample for one of the policy
    itself, whatever policy it is of. Metrics as of `policy_loss`; nothing is clipped.
    """
    mask_T, logprobs_T, old_logprobs_T, advantages_T = _cleared(mask_T, logprobs_T, old_logprobs_T, advantages_T)
    loss = -token_mean(_weighted(advantages_T * logprobs_T, weights_T), mask_T, total_tokens)
    return loss, _ratio_metrics(logprobs_T, old_logprobs_T, mask_T, total_tokens, torch.zeros_like(mask_T))


def sequence_policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    lengths_E: Tensor,
    clip_low: float,
    clip_high: float,
    total_tokens: int | float | Tensor,
    *,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO (Zheng et al. 2025): PPO's surrogate with one ratio for a whole answer.

    The ratio of an answer is the geometric mean of its tokens' ratios, over its unmasked tokens; every token carries it
    with an advantage of its own, so that the rewards of several turns fit in. The E answers lie one after the other,
    `lengths_E` tokens each. With one advantage an answer and the mean over answers of token means this is the paper's
    objective. Deviation: the mean log-ratio is clamped to +-20. Metrics as of `policy_loss`.
    """
    mask_T, logprobs_T, old_logprobs_T, advantages_T = _cleared(mask_T, logprobs_T, old_logprobs_T, advantages_T)
    mean_T = sequence_means(logprobs_T - old_logprobs_T, mask_T, lengths_E)
    ratio_T = mean_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    worth_T, clipped_T = _clipped_worth(ratio_T, advantages_T, clip_low, clip_high)
    loss = -token_mean(_weighted(worth_T, weights_T), mask_T, total_tokens)
    return loss, _ratio_metrics(logprobs_T, old_logprobs_T, mask_T, total_tokens, clipped_T)


def clipped_weight_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    clip_low: float,
    clip_high: float,
    total_tokens: int | float | Tensor,
    *,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO (MiniMax 2025): `-sg(clip(r, 1 - low, 1 + high)) A log p`, so that no token loses its gradient.

    The clip holds the importance weight, not the objective. The paper has no lower clip: `clip_low = 1`. Metrics as of
    `policy_loss`, where `clip_fraction` counts the clipped weights.
    """
    mask_T, logprobs_T, old_logprobs_T, advantages_T = _cleared(mask_T, logprobs_T, old_logprobs_T, advantages_T)
    ratio_T = _log_ratio(logprobs_T.detach(), old_logprobs_T).exp()
    held_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss = -token_mean(_weighted(held_T * advantages_T * logprobs_T, weights_T), mask_T, total_tokens)
    return loss, _ratio_metrics(logprobs_T, old_logprobs_T, mask_T, total_tokens, held_T != ratio_T)


def path_consistency_loss(
    logprobs_T: Tensor,
    normalizers_T: Tensor,
    reference_logprobs_T: Tensor,
    reference_normalizers_T: Tensor,
    rewards_T: Tensor,
    mask_T: Tensor,
    lengths_E: Tensor,
    temperature: float,
    gamma: float,
    total_tokens: int | float | Tensor,
    *,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Soft Q-learning with the logits as Q-values, by path consistency (Nachum et al. 2017).

    With `Q = b z` for the logits z and the temperature b, `V = b logsumexp(z)` and `log p = (Q - V) / b`: the policy is
    its own Q-function (Guo et al. 2021). On the best policy, for every place t of every path,
    `V_t = sum_(k >= t) gamma^(k-t) (r_k - b log p_k / ref_k)`; the loss is half the square of what is missing. Any
    policy may have sampled the path: no importance weight is needed.

    Deviations: both V and the logarithms are measured from the frozen reference (`normalizers_T` are logsumexp(z)), so
    that a pretrained model begins at V = 0 and is pulled to the reference, not to the uniform policy; paths run to
    the end of the episode, whose value is 0, also where the environment cut it; a masked token breaks no path, but its
    own term is left out.

    Metrics: `soft_value`, the mean of V; `clip_fraction` and `clamped` are 0.
    """
    mask_T = mask_T.bool()
    logprobs_T, normalizers_T = (_zero_where_masked(column, mask_T) for column in (logprobs_T, normalizers_T))
    reference_logprobs_T, reference_normalizers_T, rewards_T = (
        _zero_where_masked(column.detach(), mask_T)
        for column in (reference_logprobs_T, reference_normalizers_T, rewards_T)
    )
    values_T = temperature * (normalizers_T - reference_normalizers_T)
    gains_T = rewards_T - temperature * (logprobs_T - reference_logprobs_T)
    missing_T = discounted_sums(gains_T, lengths_E, gamma) - values_T
    loss = 0.5 * token_mean(_weighted(missing_T.square(), weights_T), mask_T, total_tokens)
    return loss, {"soft_value": token_mean(values_T.detach(), mask_T, total_tokens)}


def value_loss(
    values_T: Tensor,
    old_values_T: Tensor,
    returns_T: Tensor,
    mask_T: Tensor,
    clip: float | None,
    total_tokens: int | float | Tensor,
    *,
    weights_T: Tensor | None = None,
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
    loss = token_mean(_weighted(error_T, weights_T), mask_T, total_tokens)
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


def sequence_means(values_T: Tensor, mask_T: Tensor, lengths_E: Tensor) -> Tensor:
    """At every token the mean over the unmasked tokens of its answer; 0 where an answer has none."""
    answer_T = answers_of(lengths_E, len(values_T))
    sums_E, counts_E = (
        values_T.new_zeros(len(lengths_E)).index_add(0, answer_T, column_T)
        for column_T in (_zero_where_masked(values_T, mask_T), mask_T.to(values_T.dtype))
    )
    return (sums_E / counts_E.clamp(min=1))[answer_T]


def answers_of(lengths_E: Tensor, tokens: int) -> Tensor:
    """The number of each token's answer: the E answers lie one after the other, `tokens` in all."""
    answers_E = torch.arange(len(lengths_E), device=lengths_E.device)
    return answers_E.repeat_interleave(lengths_E, output_size=tokens)


def tokens_left(lengths_E: Tensor, tokens: int) -> Tensor:
    """How many tokens of its answer come after each."""
    ends_T = lengths_E.cumsum(0).repeat_interleave(lengths_E, output_size=tokens)
    return ends_T - 1 - torch.arange(tokens, device=lengths_E.device)


def discounted_sums(values_T: Tensor, lengths_E: Tensor, decay: float) -> Tensor:
    """`sum_(k >= t) decay^(k-t) values_k` up to the end of each answer; differentiable.

    A scan from the end in log2(T) rounds over all answers at once: after each, a sum reaches over twice as many tokens.
    """
    left_T = tokens_left(lengths_E, len(values_T))
    sums_T, reach = values_T, 1
    while reach < len(values_T):
        beyond_T = torch.cat([sums_T[reach:], sums_T.new_zeros(reach)])
        sums_T = sums_T + torch.where(left_T >= reach, decay**reach * beyond_T, 0)
        reach *= 2
    return sums_T


def _cleared(
    mask_T: Tensor, logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns without what stands at masked places; only the log-probabilities keep their graph."""
    mask_T = mask_T.bool()
    return (
        mask_T,
        _zero_where_masked(logprobs_T, mask_T),
        _zero_where_masked(old_logprobs_T.detach(), mask_T),
        _zero_where_masked(advantages_T.detach(), mask_T),
    )


def _clipped_worth(
    ratio_T: Tensor, advantages_T: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate of each token, and whether a clip decided it."""
    plain_T = ratio_T * advantages_T
    worth_T = torch.minimum(plain_T, ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T)
    if dual_clip is not None:
        floor_T = torch.where(advantages_T < 0, dual_clip * advantages_T, -torch.inf)
        worth_T = torch.maximum(worth_T, floor_T)
    return worth_T, worth_T != plain_T


@torch.no_grad()
def _ratio_metrics(
    logprobs_T: Tensor, old_logprobs_T: Tensor, mask_T: Tensor, total_tokens: int | float | Tensor, clipped_T: Tensor
) -> Metrics:
    dtype = logprobs_T.dtype
    excess_T = (logprobs_T - old_logprobs_T).abs() > LOG_RATIO_LIMIT
    return {
        "clip_fraction": token_mean(clipped_T.to(dtype), mask_T, total_tokens),
        "kl/behaviour": token_mean(kl("k3", old_logprobs_T, logprobs_T), mask_T, total_tokens),
        "clamped": excess_T.sum().to(dtype),
    }


def _weighted(values_T: Tensor, weights_T: Tensor | None) -> Tensor:
    return values_T if weights_T is None else values_T * weights_T


def _log_ratio(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    return (logprobs_T - other_logprobs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _zero_where_masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_T, 0)
