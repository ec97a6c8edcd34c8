"""Attention over a packed batch in one call: flex_attention with a block mask made from the batch's tables.

Owns: the mask of a whole batch, as a rule for single rows and as a table of blocks. Does not know models or the other
form (`attention.py`), which says the same in plain calls.

Row i sees row j where j <= i < seen_until[j], one number a row (`Batch.seen_until_T`). From its largest and smallest in
each block follow the blocks that are empty and are skipped, and those that are seen whole and need no rule. The table
is made from those, not from a mask of T x T, which at 64k rows would be 4 GB.

Why flex and not `torch.nn.attention.varlen`: that one knows sequences, not beginnings shared by several, and those
are our ordinary batch; a batch that shares nothing is the same kernel with fewer blocks. It is compiled: uncompiled it
keeps all scores, which is for tests only.

Legend: T packed rows, Q blocks of rows, K blocks of seen rows, H heads, D head size.
"""

from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rollcast_learners.batch import Batch

BLOCK = 128
"""Rows and columns of a block: what the kernels are made for."""


def block_mask(batch: Batch, device: torch.device) -> BlockMask:
    """What `attend` needs to know of a batch. Made once a micro-batch, read by every layer."""
    seen_until = batch.seen_until_T
    seen_until_T = torch.from_numpy(seen_until).to(device)

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, other: Tensor) -> Tensor:
        return (other <= row) & (row < seen_until_T[other])

    partial_QK, whole_QK = blocks_of(seen_until)
    tables = (*_listed(partial_QK, device), *_listed(whole_QK, device))
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(batch.tokens, batch.tokens))


def blocks_of(seen_until_T: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks are seen in part, and which as a whole; (Q, K) both."""
    rows = len(seen_until_T)
    first_K = np.arange(0, rows, BLOCK)
    last_K = np.minimum(first_K + BLOCK, rows) - 1
    most_K, least_K = np.maximum.reduceat(seen_until_T, first_K), np.minimum.reduceat(seen_until_T, first_K)
    before_QK = first_K[None, :] < first_K[:, None]
    some_QK = before_QK & (most_K[None, :] > first_K[:, None]) | np.eye(len(first_K), dtype=np.bool_)
    whole_QK = before_QK & (least_K[None, :] > last_K[:, None])
    whole_QK[rows // BLOCK :] = False  # The last block of rows, where it is incomplete.
    return some_QK & ~whole_QK, whole_QK


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
