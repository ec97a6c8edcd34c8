"""Attention over a packed batch, plugged into any Hugging Face model through its attention registry.

Owns: which packed rows see which, and in what form a device is told. Does not know the model around it or losses.

Each prefix sees itself causally; each tail sees its prefix whole and itself causally. A prefix with a single tail is
one plain causal sequence. Small families (a prefix and its tails) go through one masked call; large ones through one
call a segment, so that no mask grows with the square of a family. Exact in all forms, and on a CPU that is all.

On a GPU those calls are too many, and a mask sends grouped heads to the kernel that keeps all scores: there a batch of
more than one sequence goes through one call a layer (`attention_flex.py`), and a single sequence through one plain
causal call, which needs no mask. Works without FlashAttention.

Legend: T packed rows, L rows of a query piece, K rows its keys come from, H heads, D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
LARGEST_MASKED_FAMILY = 1024
JOINED_ROWS = 256
"""Small families share a call up to so many rows: on a CPU each call costs more than the scores it masks away."""
Family = tuple[int, list[int]]
"""Length of a prefix, and of each of its tails."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive rows that are the queries of one attention call; `keys` are pieces, in order."""

    length: int
    keys: tuple[int, ...]
    mask_LK: Tensor | None
    """Added to the scores; None means plain causal over the piece itself."""


@dataclass(frozen=True, eq=False)
class Packing:
    """How one packed batch attends. Made once a micro-batch, read by every layer."""

    pieces: tuple[Piece, ...]

    @property
    def lengths(self) -> list[int]:
        return [piece.length for piece in self.pieces]


def packing_of(batch: Batch, dtype: torch.dtype, device: torch.device) -> Packing | BlockMask:
    """Turns the batch's tables into attention calls, in the form that suits the device."""
    one_sequence = len(batch.prefix_length_P) == 1 and np.count_nonzero(batch.tail_length_S) <= 1
    if device.type == "cuda" and not one_sequence:
        return attention_flex.block_mask(batch, device)
    return pieces_of(batch, dtype, device)


def pieces_of(batch: Batch, dtype: torch.dtype, device: torch.device) -> Packing:
    """One call a family, for a few small families together, or one a segment of a large one."""
    pieces: list[Piece] = []
    for families in _together(families_of(batch)):
        rows = sum(_rows(family) for family in families)
        prefix_length, lengths = families[0]
        if len(families) == 1 and len(lengths) <= 1:
            pieces.append(Piece(rows, (len(pieces),), None))
        elif rows <= LARGEST_MASKED_FAMILY:
            pieces.append(Piece(rows, (len(pieces),), additive(joined_mask(families), dtype, device)))
        else:
            pieces.extend(_large_family(len(pieces), prefix_length, lengths, dtype, device))
    return Packing(tuple(pieces))


def families_of(batch: Batch) -> list[Family]:
    """Length of each prefix, and those of its tails that have any."""
    tails_of = np.split(
        batch.tail_length_S, np.searchsorted(batch.tail_prefix_S, np.arange(1, len(batch.prefix_length_P)))
    )
    return [
        (prefix_length, [int(n) for n in tail_lengths if n > 0])
        for prefix_length, tail_lengths in zip(batch.prefix_length_P.tolist(), tails_of, strict=True)
    ]


def _together(families: list[Family]) -> Iterator[list[Family]]:
    """Neighbours that fit into one call."""
    joined: list[Family] = []
    for family in families:
        if joined and sum(map(_rows, joined)) + _rows(family) > min(JOINED_ROWS, LARGEST_MASKED_FAMILY):
            yield joined
            joined = []
        joined.append(family)
    if joined:
        yield joined


def _rows(family: Family) -> int:
    return family[0] + sum(family[1])


def joined_mask(families: list[Family]) -> NDArray[np.bool_]:
    """Of families that lie one after the other, and see nothing of each other."""
    rows = sum(map(_rows, families))
    seen, start = np.zeros((rows, rows), np.bool_), 0
    for family in families:
        end = start + _rows(family)
        seen[start:end, start:end] = family_mask(*family)
        start = end
    return seen


def family_mask(prefix_length: int, tail_lengths: list[int]) -> NDArray[np.bool_]:
    """Which row of a family sees which: `[prefix][tail][tail]...`, square."""
    owner = np.repeat(np.arange(len(tail_lengths) + 1), [prefix_length, *tail_lengths])
    rows = np.arange(len(owner))
    same = owner[:, None] == owner[None, :]
    mask: NDArray[np.bool_] = (same | (owner[None, :] == 0)) & (rows[:, None] >= rows[None, :])
    return mask


def additive(seen: NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> Tensor:
    zeros = torch.zeros(seen.shape, dtype=dtype, device=device)
    return zeros.masked_fill_(upload(~seen, device), float("-inf"))


def _large_family(
    first: int, prefix_length: int, tail_lengths: list[int], dtype: torch.dtype, device: torch.device
) -> list[Piece]:
    pieces = [Piece(prefix_length, (first,), None)]
    for length in tail_lengths:
        seen = np.tri(length, prefix_length + length, prefix_length, dtype=np.bool_)
        pieces.append(Piece(length, (first, first + len(pieces)), additive(seen, dtype, device)))
    return pieces


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
    shared = query.shape[1] != key.shape[1]
    outputs = []
    for piece, q in zip(packing.pieces, queries, strict=True):
        k = torch.cat([keys[i] for i in piece.keys], dim=2) if len(piece.keys) > 1 else keys[piece.keys[0]]
        v = torch.cat([values[i] for i in piece.keys], dim=2) if len(piece.keys) > 1 else values[piece.keys[0]]
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
