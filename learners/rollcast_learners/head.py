"""From hidden states to log-probabilities and entropies, without ever building full logits.

Owns: the product with the vocabulary, the log-softmax and their gradients. Does not know models, losses or
masks: pass only the rows that are trained.

Full logits of 2,048 tokens at V = 49,152 are 0.4 GB in float32, and a plain log-softmax with entropy keeps
several of them for its backward pass. Here rows go through in chunks and the backward pass computes each
chunk's logits again: one matrix product more (4/3 of the arithmetic), and yet faster on a CPU, because the
float32 work reuses few pages instead of touching gigabytes of fresh ones. Recomputation is the idea of Cut
Cross-Entropy (Wijmans et al. 2024), chunks that of Liger (Hsu et al. 2024). Deviation: both end in a loss;
ours ends in log-probabilities and entropies, with gradients through both, since PPO's loss comes afterwards.

Precision: matrix products in the dtype of `hidden` (or of autocast), everything between them in float32
(float64 for float64), the weight's gradient accumulated over chunks in float32 and returned in the weight's
own dtype, so that float32 master weights under autocast receive it without a last rounding.

Backends: `chunked` is the form above, in torch alone, anywhere; `triton` is the same on NVIDIA GPUs with its own
kernels between the products (`head_triton.py`, imported only when asked for); `naive` keeps all logits, as a yardstick.

Legend for shapes: T tokens, V vocabulary, D hidden; C rows of a chunk, R rows of a tile.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Smaller steps are a little faster on idle cores (64 rows fit a cache) and much slower on busy ones: every
# operation ends in a barrier, and beside an engine on two cores each barrier may cost a time slice of 4 ms.
CHUNK_ROWS = 512
"""Rows of one backward matrix product: fewer make the weight's gradient slow, more only cost memory."""
TILE_ROWS = 256
"""Rows in float32 at a time: two tiles of 50 MB at V = 49,152, reused throughout."""
VOCABULARY_BLOCK = 16384
"""Rows of the weight's gradient added at a time: adding bfloat16 to float32 first copies the block."""


Backend = Literal["chunked", "naive", "triton"]


class Scores(NamedTuple):
    """What a row of hidden states says of its target. Head -> policy."""

    logprobs_T: Tensor
    entropy_T: Tensor
    normalizers_T: Tensor
    """`logsumexp(hidden weight^T / temperature)`: the soft value of a policy whose logits are Q-values."""


def logprobs_and_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets_T`, and entropy in nat, under `softmax(hidden weight^T / temperature)`.

    Both float32 (float64 for float64). Differentiable once, through both results, with respect to `hidden_TD`
    and `weight_VD`.
    """
    found = scores(hidden_TD, weight_VD, targets_T, temperature)
    return found.logprobs_T, found.entropy_T


def scores(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float = 1.0, backend: Backend = "chunked"
) -> Scores:
    """`logprobs_and_entropy`, and beside them the normaliser; differentiable once, through all three.

    `naive` builds the logits of all rows at once: the yardstick. Raises `ValueError` for `triton` without a GPU.
    """
    _check_arguments(hidden_TD, weight_VD, targets_T, temperature)
    if backend == "naive":
        return _naive(hidden_TD, weight_VD, targets_T.long(), temperature)
    passes = _passes(backend, hidden_TD.device)
    arguments = hidden_TD, weight_VD, targets_T.long(), temperature, _product_dtype(hidden_TD), passes
    found = cast(tuple[Tensor, Tensor, Tensor], _RecomputedHead.apply(*arguments))  # type: ignore[no-untyped-call]
    return Scores(*found)


class Passes(NamedTuple):
    """The two halves of a backend that keeps no logits from one for the other."""

    score: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    """Log-probability, entropy and normaliser of every row."""
    accumulate: Callable[[Tensor, Tensor, "LogitGradient", float, Tensor | None, Tensor | None], None]
    """The backward pass, into those gradients that are wanted."""


def _passes(backend: Backend, device: torch.device) -> Passes:
    if backend == "chunked":
        return Passes(_score, _accumulate)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'head "triton" needs an NVIDIA GPU, and the hidden states are on {device}: set learner.head to "chunked"'
        )
    from rollcast_learners import head_triton  # Here, since Triton comes with CUDA builds of torch only.

    return Passes(head_triton.score, head_triton.accumulate)


def _naive(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float) -> Scores:
    logits_TV = (hidden_TD @ weight_VD.T).to(reduction_dtype(hidden_TD.dtype)) / temperature
    logprobs_TV = logits_TV.log_softmax(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return Scores(_picked(logprobs_TV, targets_T), entropy_T, logits_TV.logsumexp(-1))


class _RecomputedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        temperature: float,
        dtype: torch.dtype,
        passes: Passes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.accumulate = temperature, passes.accumulate
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        logprobs_T, entropy_T, normaliser_T = passes.score(hidden_TD, weight_VD, targets_T, temperature)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, entropy_T, normaliser_T)
        return logprobs_T, entropy_T, normaliser_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None, grad_normaliser_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, entropy_T, normaliser_T = ctx.saved_tensors
        grads = grad_logprobs_T, grad_entropy_T, grad_normaliser_T
        gradient = _logit_gradient(targets_T, *grads, entropy_T, normaliser_T, ctx.temperature)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden_TD = torch.zeros_like(hidden_TD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=normaliser_T.dtype) if wants_weight else None
        ctx.accumulate(hidden_TD, weight_VD, gradient, ctx.temperature, grad_hidden_TD, grad_weight_VD)
        hidden_dtype, weight_dtype = ctx.dtypes
        return _cast(grad_hidden_TD, hidden_dtype), _cast(grad_weight_VD, weight_dtype), None, None, None, None


class LogitGradient(NamedTuple):
    """`d loss / d logit_v = chosen_T [v = target] - softmax_v (constant_T + slope_T logit_v)`, before the
    temperature is divided out of the logits; `slope_T` is None when the entropy takes no part in the loss."""

    targets_T: Tensor
    normaliser_T: Tensor
    chosen_T: Tensor
    constant_T: Tensor
    slope_T: Tensor | None

    def rows(self, rows: slice) -> "LogitGradient":
        slope_T = None if self.slope_T is None else self.slope_T[rows]
        columns = self.targets_T[rows], self.normaliser_T[rows], self.chosen_T[rows], self.constant_T[rows]
        return LogitGradient(*columns, slope_T)


def _score(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and normaliser (log sum exp) of every row, a tile at a time."""
    tokens, vocabulary = len(hidden_TD), len(weight_VD)
    exact = reduction_dtype(hidden_TD.dtype)
    logprobs_T, entropy_T, normaliser_T = (hidden_TD.new_empty(tokens, dtype=exact) for _ in range(3))
    product_RV = hidden_TD.new_empty(min(TILE_ROWS, tokens), vocabulary)
    logits_RV, logprobs_RV = (torch.empty_like(product_RV, dtype=exact) for _ in range(2))
    for rows in spans(tokens, TILE_ROWS):
        size = rows.stop - rows.start
        product, logits, logprobs = product_RV[:size], logits_RV[:size], logprobs_RV[:size]
        torch.mm(hidden_TD[rows], weight_VD.T, out=product)
        _tempered(product, temperature, out_RV=logits)
        torch.log_softmax(logits, -1, out=logprobs)
        logprobs_T[rows] = _picked(logprobs, targets_T[rows])
        normaliser_T[rows] = _picked(logits, targets_T[rows]) - logprobs_T[rows]
        entropy_T[rows] = -torch.exp(logprobs, out=logits).mul_(logprobs).sum(-1)
    return logprobs_T, entropy_T, normaliser_T


def _logit_gradient(
    targets_T: Tensor,
    grad_logprobs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    grad_normaliser_T: Tensor | None,
    entropy_T: Tensor,
    normaliser_T: Tensor,
    temperature: float,
) -> LogitGradient:
    """`d logprob / d z_v = [v = target] - p_v`, `d entropy / d z_v = -p_v (log p_v + entropy)`, and that of the
    normaliser is `p_v`."""
    chosen_T = torch.zeros_like(entropy_T) if grad_logprobs_T is None else grad_logprobs_T / temperature
    constant_T = chosen_T if grad_normaliser_T is None else chosen_T - grad_normaliser_T / temperature
    if grad_entropy_T is None:
        return LogitGradient(targets_T, normaliser_T, chosen_T, constant_T, None)
    slope_T = grad_entropy_T / temperature
    constant_T = constant_T + slope_T * (entropy_T - normaliser_T)
    return LogitGradient(targets_T, normaliser_T, chosen_T, constant_T, slope_T)


def _accumulate(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    gradient: LogitGradient,
    temperature: float,
    grad_hidden_TD: Tensor | None,
    grad_weight_VD: Tensor | None,
) -> None:
    """The backward pass, into those gradients that are wanted: logits again, their gradient, two products."""
    tokens, vocabulary = len(hidden_TD), len(weight_VD)
    chunk_CV = hidden_TD.new_empty(min(CHUNK_ROWS, tokens), vocabulary)
    exact = reduction_dtype(hidden_TD.dtype)
    tiles = [chunk_CV.new_empty(min(TILE_ROWS, tokens), vocabulary, dtype=exact)]
    if gradient.slope_T is not None:
        tiles.append(torch.empty_like(tiles[0]))
    for rows in spans(tokens, CHUNK_ROWS):
        logits_CV = chunk_CV[: rows.stop - rows.start]
        torch.mm(hidden_TD[rows], weight_VD.T, out=logits_CV)
        _replace_by_gradient(logits_CV, gradient.rows(rows), temperature, tiles)
        if grad_hidden_TD is not None:
            torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[rows])
        if grad_weight_VD is not None:
            add_product(grad_weight_VD, logits_CV, hidden_TD[rows])


def _replace_by_gradient(logits_CV: Tensor, gradient: LogitGradient, temperature: float, tiles: list[Tensor]) -> None:
    """Overwrites logits by the loss's gradient with respect to them, a tile at a time."""
    for rows in spans(len(logits_CV), TILE_ROWS):
        targets_R, _, chosen_R, constant_R, slope_R = gradient.rows(rows)
        tile_RV, *spare = (tile[: rows.stop - rows.start] for tile in tiles)
        _tempered(logits_CV[rows], temperature, out_RV=tile_RV)
        factor_RV = constant_R[:, None]
        if slope_R is not None:
            factor_RV = torch.addcmul(factor_RV, tile_RV, slope_R[:, None], out=spare[0])
        torch.softmax(tile_RV, -1, out=tile_RV)
        tile_RV.mul_(factor_RV).neg_()
        tile_RV.scatter_add_(-1, targets_R[:, None], chosen_R[:, None])
        logits_CV[rows].copy_(tile_RV)


def add_product(grad_weight_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """`grad_weight += grad^T hidden`, the sum in the gradient's own dtype."""
    if grad_CV.is_cuda and grad_weight_VD.dtype != grad_CV.dtype:
        # cuBLAS adds to float32 as it multiplies: nothing is rounded to bfloat16 or written twice.
        torch.addmm(grad_weight_VD, grad_CV.T, hidden_CD, out_dtype=grad_weight_VD.dtype, out=grad_weight_VD)
        return
    for block in spans(len(grad_weight_VD), VOCABULARY_BLOCK):
        grad_weight_VD[block] += grad_CV[:, block].T @ hidden_CD


def _tempered(product_RV: Tensor, temperature: float, out_RV: Tensor) -> None:
    out_RV.copy_(product_RV)
    if temperature != 1.0:
        out_RV.div_(temperature)


def _picked(values_RV: Tensor, targets_R: Tensor) -> Tensor:
    return values_RV.gather(-1, targets_R[:, None]).squeeze(-1)


def spans(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _product_dtype(hidden_TD: Tensor) -> torch.dtype:
    device = hidden_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _check_arguments(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0: pass the sampler's")
    hidden, weight, targets = tuple(hidden_TD.shape), tuple(weight_VD.shape), tuple(targets_T.shape)
    if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1] or targets != hidden[:1]:
        raise ValueError(
            f"hidden, weight and targets have shapes {hidden}, {weight} and {targets}; expected "
            "(T, D), (V, D) and (T,): pass packed rows, each with the token it predicts"
        )
