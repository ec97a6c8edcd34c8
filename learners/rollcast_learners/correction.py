"""Off-policy correction: how much a sample of an older policy counts for the present one.

Owns: one weight a token, from the log-probabilities of the two policies, and how many samples the weights are worth.
Does not know losses, models or staleness. Nothing here is differentiable: weights are data to the losses.

Three policies take part in asynchronous training: the *behaviour* policy sampled the token (a mix of versions where an
answer was continued under new weights; its log-probability is kept for each token), the *proximal* policy is the one at
the beginning of the step, and the policy is being optimised. Without a correction the loss measures its ratio from the
behaviour policy (naive: the clip then acts on old samples before anything was learned from them). With one, the ratio
is measured from the proximal policy, and the weight here stands for proximal against behaviour.

Legend for shapes: T tokens, E answers.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from rollcast_learners.losses import LOG_RATIO_LIMIT, answers_of

Correction = Literal["none", "decoupled", "token_tis", "sequence_tis", "token_mask", "sequence_mask"]


def weights(
    kind: Correction,
    proximal_T: Tensor,
    behaviour_T: Tensor,
    mask_T: Tensor,
    lengths_E: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """The weight of every token; 1 without a correction, and 0 at masked tokens only where the mask says so itself.

    With `w = proximal / behaviour` of a token, and `W` the product over the unmasked tokens of its answer:
    `decoupled` is w (Hilton et al. 2021, arXiv 2110.00641; AReaL, Fu et al. 2025, arXiv 2505.24298), `token_tis` is
    min(w, high) (Yao et al. 2025, truncated importance sampling), `sequence_tis` is min(W, high), `token_mask` is w
    where low <= w <= high, else 0 (IcePop, Ling team 2025), and `sequence_mask` is W where W <= high, else 0 (Liu et
    al. 2025, masked importance sampling).

    Deviation: log-ratios are clamped to +-20. Raises `ValueError` for another kind.
    """
    if kind == "none":
        return torch.ones_like(proximal_T)
    if kind not in _RULES:
        raise ValueError(f"correction is {kind!r}; expected none or one of {', '.join(_RULES)}: set buffer.correction")
    gap_T = torch.where(mask_T.bool(), proximal_T.detach() - behaviour_T.detach(), 0)
    if kind.startswith("sequence"):
        answer_T = answers_of(lengths_E, len(gap_T))
        gap_T = gap_T.new_zeros(len(lengths_E)).index_add(0, answer_T, gap_T)[answer_T]
    return _RULES[kind](gap_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), low, high)


def effective_share(moments_3: Iterable[Tensor | float]) -> float:
    """Effective sample size over the number of tokens, `(sum w)^2 / (n sum w^2)` (Kong 1992): 1 where all weigh alike.

    From the `advantages.moments` of the unmasked weights, added over learners. 0 where nothing weighs anything.
    """
    count, total, squares = (float(moment) for moment in moments_3)
    return total**2 / (count * squares) if count and squares else 0.0


_RULES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "decoupled": lambda ratio_T, low, high: ratio_T,
    "token_tis": lambda ratio_T, low, high: ratio_T.clamp(max=high),
    "sequence_tis": lambda ratio_T, low, high: ratio_T.clamp(max=high),
    "token_mask": lambda ratio_T, low, high: torch.where((ratio_T >= low) & (ratio_T <= high), ratio_T, 0),
    "sequence_mask": lambda ratio_T, low, high: torch.where(ratio_T <= high, ratio_T, 0),
}
