"""Attention over a packed batch, plugged into any Hugging Face model through its attention registry.

Owns: which packed rows see which, and in what form a device is told. Does not know the model around it or losses.

A row sees the segments above its own and its own up to itself (`Batch.seen_until_T`). Rows are cut into runs of whole
segments, each the queries of one masked call over itself and the segments above it: so no mask grows with the square of
a batch. A run that is one sequence needs no mask. Exact in all forms, and on a CPU that is all.

On a GPU those calls are too many, and a mask sends grouped heads to the kernel that keeps all scores: there a batch of
more than one sequence goes through one call a layer (`attention_flex.py`), and a single sequence through one plain
causal call, which needs no mask. Works without FlashAttention.

Legend: T packed rows, L rows of a query piece, K rows its keys come from, H heads, D head size.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rollcast_learners import attention_flex
from rollcast_learners.batch import Batch
from rollcast_learners.upload import upload

NAME = "rollcast_packed"
JOINED_ROWS = 256
"""Segments share a call up to so many rows: on a CPU each call costs more than the scores it masks away."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive rows that are the queries of one attention call."""

    length: int
    above: tuple[int, ...]
    """Parts of the packing that they see besides themselves."""
    mask_LK: Tensor | None
    """Added to the scores, of those parts first; None means plain causal over the piece itself."""


@dataclass(frozen=True, eq=False)
class Packing:
    """How one packed batch attends. Made once a micro-batch, read by every layer."""

    pieces: tuple[Piece, ...]
    parts: tuple[int, ...] = ()
    """Lengths of another division of the same rows: every segment that a piece sees from outside is one."""

    @property
    def lengths(self) -> list[int]:
        return [piece.length for piece in self.pieces]

    @classmethod
    def of_equals(cls, count: int, length: int) -> "Packing":
        """`count` sequences of one length, with nothing in common."""
        return cls((Piece(length, (), None),) * count)


def packing_of(batch: Batch, dtype: torch.dtype, device: torch.device) -> Packing | BlockMask:
    """Turns the batch's tables into attention calls, in the form that suits the device."""
    if device.type == "cuda" and not _is_one_sequence(batch.seen_until_T):
        return attention_flex.block_mask(batch, device)
    return pieces_of(batch, dtype, device)


def pieces_of(batch: Batch, dtype: torch.dtype, device: torch.device) -> Packing:
    """One call for a few small segments together, or for one large one."""
    seen_until_T = batch.seen_until_T
    if _is_one_sequence(seen_until_T):
        return Packing((Piece(batch.tokens, (), None),))
    starts, lengths = batch.segment_start_S.tolist(), batch.segment_length_S.tolist()
    rows_of = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    runs = runs_of(lengths)
    outside = [batch.above(first) for first, _ in runs]
    edges = {starts[s] + further for s in chain(*outside) for further in (0, lengths[s])}
    bounds = sorted({0, batch.tokens} | edges)
    part_from = {start: part for part, start in enumerate(bounds)}
    pieces = []
    for (first, after), above in zip(runs, outside, strict=True):
        own = np.concatenate(rows_of[first:after])
        mask_LK = None
        if above or seen_until_T[own].min() <= own[-1]:
            seen = sees(seen_until_T, own, np.concatenate([*(rows_of[s] for s in above), own]))
            mask_LK = additive(seen, dtype, device)
        pieces.append(Piece(len(own), tuple(part_from[starts[s]] for s in above), mask_LK))
    return Packing(tuple(pieces), tuple(np.diff(bounds).tolist()))


def runs_of(lengths: list[int]) -> list[tuple[int, int]]:
    """First segment of each run, and the one after its last: neighbours that fit into one call."""
    runs: list[tuple[int, int]] = []
    rows = 0
    for segment, length in enumerate(lengths):
        first = segment
        rows += length
        if runs and rows <= JOINED_ROWS:
            first, _ = runs.pop()
        else:
            rows = length
        runs.append((first, segment + 1))
    return runs


def sees(seen_until_T: NDArray[np.int32], rows: NDArray[np.intp], others: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which of `rows` sees which of `others`, (L, K)."""
    seen: NDArray[np.bool_] = (others[None, :] <= rows[:, None]) & (rows[:, None] < seen_until_T[others][None, :])
    return seen


def _is_one_sequence(seen_until_T: NDArray[np.int32]) -> bool:
    return bool((seen_until_T == len(seen_until_T)).all())


def additive(seen: NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> Tensor:
    zeros = torch.zeros(seen.shape, dtype=dtype, device=device)
    return zeros.masked_fill_(upload(~seen, device), float("-inf"))


# Compiled layers (`compiled.py`) call it as it is; what it calls may be compiled itself.
@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | BlockMask,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer; (1, H, T, D) in, (1, T, H, D) out."""
    if not isinstance(packing, Packing):
        return attention_flex.attend(query, key, value, packing, scaling).transpose(1, 2), None
    lengths = packing.lengths
    # Split and cat, not slices: the gradient of a slice is a zero tensor as large as the whole batch.
    queries, keys, values = (tensor.split_with_sizes(lengths, 2) for tensor in (query, key, value))
    parts = list(packing.parts) or lengths
    part_keys, part_values = (tensor.split_with_sizes(parts, 2) for tensor in (key, value))
    shared = query.shape[1] != key.shape[1]
    outputs = []
    for piece, q, k, v in zip(packing.pieces, queries, keys, values, strict=True):
        if piece.above:
            k = torch.cat([*(part_keys[part] for part in piece.above), k], dim=2)
            v = torch.cat([*(part_values[part] for part in piece.above), v], dim=2)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, piece.mask_LK, is_causal=piece.mask_LK is None, scale=scaling, enable_gqa=shared
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def register() -> str:
    """Makes the attention known to transformers and returns its name for `attn_implementation=`.

    No mask goes with it: the packing carries its own, and to make one transformers would wait for the device.
    """
    AttentionInterface.register(NAME, packed_attention)
    return NAME
