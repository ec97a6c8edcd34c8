"""The head on an NVIDIA GPU: cuBLAS for the products with the vocabulary, one Triton kernel for all that lies between.

Owns: the two kernels, and the walk over chunks of rows. Does not know autograd, autocast or which gradient the loss
asks for: `head.py` calls it with the formulas ready.

Why so, and not one kernel that multiplies too: forward and backward are four products of M x D x V (the logits once
more for the backward pass), and cuBLAS is the fastest there is at them without a kernel written for one generation of
cards. What is left is bound by memory alone: a bfloat16 chunk of logits is read once for log-sum-exp, entropy and
target, and read and written once for the gradient; next to products with D in the thousands that is little. Torch alone
goes over a float32 copy of it again and again (`head.py`). Only a chunk of logits exists at a time, as in `chunked`.
Online log-sum-exp: Milakov and Gimelshein 2018 (arXiv 1805.02867). Deviation: the entropy's sum is carried along.

Precision: logits are divided by the temperature inside the product, before they are rounded to its dtype; the kernels
compute in float32 (float64 for float64), and the weight's gradient is added up in float32 by cuBLAS itself.

Legend for shapes: T tokens, V vocabulary, D hidden; C rows of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rollcast_learners.head import LogitGradient, add_product, reduction_dtype, spans

CHUNK_ROWS = 4096
"""Rows of a product: 1.1 GB of bfloat16 logits at V = 131,072. Each chunk reads and writes the weight's gradient once,
4.3 GB there at D = 4,096, and so fewer rows cost bandwidth."""
BLOCK = 4096
"""Logits of a row that a program takes at a time; a power of two."""
WARPS = 8


def score(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and normaliser (log sum exp) of every row."""
    tokens, vocabulary = len(hidden_TD), len(weight_VD)
    exact = reduction_dtype(hidden_TD.dtype)
    logprobs_T, entropy_T, normaliser_T = (hidden_TD.new_empty(tokens, dtype=exact) for _ in range(3))
    chunk_CV = hidden_TD.new_empty(min(CHUNK_ROWS, tokens), vocabulary)
    for rows in spans(tokens, CHUNK_ROWS):
        logits_CV = _tempered_logits(hidden_TD[rows], weight_VD, temperature, chunk_CV)
        columns = targets_T[rows], logprobs_T[rows], entropy_T[rows], normaliser_T[rows]
        _score_row[(len(logits_CV),)](logits_CV, *columns, vocabulary, BLOCK, num_warps=WARPS)
    return logprobs_T, entropy_T, normaliser_T


def accumulate(
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
    if gradient.slope_T is None:
        gradient = gradient._replace(slope_T=torch.zeros_like(gradient.constant_T))
    for rows in spans(tokens, CHUNK_ROWS):
        logits_CV = _tempered_logits(hidden_TD[rows], weight_VD, temperature, chunk_CV)
        grid = len(logits_CV), triton.cdiv(vocabulary, BLOCK)
        _replace_by_gradient[grid](logits_CV, *gradient.rows(rows), vocabulary, BLOCK, num_warps=WARPS)
        if grad_hidden_TD is not None:
            torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[rows])
        if grad_weight_VD is not None:
            add_product(grad_weight_VD, logits_CV, hidden_TD[rows])


def _tempered_logits(hidden_CD: Tensor, weight_VD: Tensor, temperature: float, chunk_CV: Tensor) -> Tensor:
    """Into the first rows of the chunk; with `beta=0` what lay there does not count, not even NaN."""
    return chunk_CV[: len(hidden_CD)].addmm_(hidden_CD, weight_VD.T, beta=0, alpha=1 / temperature)


@triton.jit
def _score_row(
    logits_CV: tl.tensor,
    targets_C: tl.tensor,
    logprobs_C: tl.tensor,
    entropy_C: tl.tensor,
    normaliser_C: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row. With `m` the largest logit so far, it carries `sum exp(z - m)` and `sum exp(z - m) (z - m)`."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_CV + row * vocabulary
    exact = logprobs_C.dtype.element_ty
    # Far below any logit, and yet finite: times a sum that is still zero it gives zero, not NaN.
    largest = tl.full([], -1e30, exact)
    total = tl.full([], 0.0, exact)
    weighted = tl.full([], 0.0, exact)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(logits_V + at, mask=inside, other=float("-inf")).to(exact)
        larger = tl.maximum(largest, tl.max(z, 0))
        below = tl.where(inside, z - larger, 0.0)
        share = tl.where(inside, tl.exp(below), 0.0)
        drop = largest - larger
        weighted = tl.exp(drop) * (weighted + drop * total) + tl.sum(share * below, 0)
        total = tl.exp(drop) * total + tl.sum(share, 0)
        largest = larger
    target = tl.load(logits_V + tl.load(targets_C + row)).to(exact)
    tl.store(logprobs_C + row, target - largest - tl.log(total))
    tl.store(entropy_C + row, tl.log(total) - weighted / total)
    tl.store(normaliser_C + row, largest + tl.log(total))


@triton.jit
def _replace_by_gradient(
    logits_CV: tl.tensor,
    targets_C: tl.tensor,
    normaliser_C: tl.tensor,
    chosen_C: tl.tensor,
    constant_C: tl.tensor,
    slope_C: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one row: the logits become the loss's gradient with respect to them (`head.LogitGradient`)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocabulary
    places = logits_CV + row * vocabulary + at
    normaliser = tl.load(normaliser_C + row)
    z = tl.load(places, mask=inside, other=0.0).to(normaliser.dtype)
    factor = tl.load(constant_C + row) + tl.load(slope_C + row) * z
    chosen = tl.where(at == tl.load(targets_C + row), tl.load(chosen_C + row), 0.0)
    gradient = chosen - tl.exp(z - normaliser) * factor
    tl.store(places, gradient.to(logits_CV.dtype.element_ty), mask=inside)
