"""Attention over a packed batch in one call: flex_attention with a block mask made from the batch's tables.

Owns: the mask of a whole batch, as a rule for single rows and as a table of blocks. Does not know models or the other
form (`attention.py`), which says the same in plain calls.

A row sees two spans of rows: its prefix, and its own segment up to itself. From that follow the rule, three numbers a
row, and the blocks: which are empty and are skipped, which are seen whole and need no rule. The table is made from the
segments, not from a mask of T x T, which at 64k rows would be 4 GB.

Why flex and not `torch.nn.attention.varlen`: that one knows sequences, not prefixes shared by several tails, and those
are our ordinary batch; a batch that shares nothing is the same kernel with fewer blocks. It is compiled: uncompiled it
keeps all scores, which is for tests only.

Legend: T packed rows, S segments in packed order, Q blocks of rows, K blocks of seen rows, X parts (what a segment has
in a block of rows), H heads, D head size.
"""

from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rollcast_learners.batch import Batch

BLOCK = 128
"""Rows and columns of a block: what the kernels are made for."""


class Segments(NamedTuple):
    """Prefixes and tails of a batch in packed order, without those that have no rows."""

    start_S: NDArray[np.int64]
    length_S: NDArray[np.int64]
    prefix_start_S: NDArray[np.int64]
    prefix_stop_S: NDArray[np.int64]
    """Of the rows before the segment that all of it sees; equal to the start where there are none."""


def segments_of(batch: Batch) -> Segments:
    """The batch's tables, put side by side."""
    of_tail = batch.tail_prefix_S
    nothing_P = np.zeros(len(batch.prefix_start_P), np.int64)
    table = np.stack(
        [
            np.concatenate([batch.prefix_start_P, batch.tail_start_S]),
            np.concatenate([batch.prefix_length_P, batch.tail_length_S]),
            np.concatenate([nothing_P, batch.prefix_start_P[of_tail]]),
            np.concatenate([nothing_P, (batch.prefix_start_P + batch.prefix_length_P)[of_tail]]),
        ]
    ).astype(np.int64)
    table = table[:, table[1] > 0]
    return Segments(*table[:, np.argsort(table[0])])


def block_mask(batch: Batch, device: torch.device) -> BlockMask:
    """What `attend` needs to know of a batch. Made once a micro-batch, read by every layer."""
    segments = segments_of(batch)
    start_T, prefix_start_T, prefix_stop_T = (
        torch.from_numpy(np.repeat(column_S, segments.length_S).astype(np.int32)).to(device)
        for column_S in (segments.start_S, segments.prefix_start_S, segments.prefix_stop_S)
    )

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, other: Tensor) -> Tensor:
        own = (other >= start_T[row]) & (other <= row)
        return own | ((other >= prefix_start_T[row]) & (other < prefix_stop_T[row]))

    partial_QK, whole_QK = blocks_of(segments)
    tables = (*_listed(partial_QK, device), *_listed(whole_QK, device))
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(batch.tokens, batch.tokens))


def blocks_of(segments: Segments) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks are seen in part, and which as a whole."""
    start_S, length_S, prefix_start_S, prefix_stop_S = segments
    rows = int(length_S.sum())
    # Within a part all rows see the same prefix, and of their segment each as far as itself.
    first_X = np.union1d(start_S, np.arange(0, rows, BLOCK))
    last_X = np.append(first_X[1:], rows) - 1
    of_X = np.searchsorted(start_S, first_X, side="right") - 1
    prefix_XK = _overlap(prefix_start_S[of_X], prefix_stop_S[of_X], rows)
    most_XK = prefix_XK + _overlap(start_S[of_X], last_X + 1, rows)
    least_XK = prefix_XK + _overlap(start_S[of_X], first_X + 1, rows)
    parts_Q = np.searchsorted(first_X, np.arange(0, rows, BLOCK))
    some_QK = np.logical_or.reduceat(most_XK > 0, parts_Q)
    whole_QK = np.logical_and.reduceat(least_XK == BLOCK, parts_Q)
    whole_QK[rows // BLOCK :] = False  # The last block of rows, where it is incomplete.
    return some_QK & ~whole_QK, whole_QK


def _overlap(from_X: NDArray[np.int64], to_X: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """How many rows of each block lie in the spans [from, to)."""
    begin_K = np.arange(0, rows, BLOCK)
    ends_XK, begins_XK = np.minimum(to_X[:, None], begin_K + BLOCK), np.maximum(from_X[:, None], begin_K)
    common_XK: NDArray[np.int64] = np.maximum(ends_XK - begins_XK, 0)
    return common_XK


def _listed(blocks_QK: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each block of rows has, and which, those it has not at the end; (1, 1, Q) and (1, 1, Q, K)."""
    count_Q, order_QK = blocks_QK.sum(-1), np.argsort(~blocks_QK, axis=-1, kind="stable")
    count, order = (torch.from_numpy(one.astype(np.int32)).to(device) for one in (count_Q, order_QK))
    return count[None, None], order[None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Attention of all packed rows; (1, H, T, D) in and out."""
    kernel = _compiled() if query.is_cuda else flex_attention
    output = kernel(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return cast(Tensor, output)


@cache
def _compiled() -> Any:
    # `fullgraph`: if torch gives up on compiling, it shall say so, not fall back to the form that keeps all scores.
    # The limit counts forms, not batches: with and without gradient, one block or more, each dtype and head size.
    # Its overloads, which mypy reads, do not know `recompile_limit` yet.
    return torch.compile(flex_attention, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]
