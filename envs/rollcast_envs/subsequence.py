"""Longest common subsequences of two token lists, fast enough for long texts.

Owns: their length, and the positions of the one that ROUGE takes. Does not know ROUGE's scores, nor how text becomes
tokens. A row of the usual table is one Python integer: a bit for each column, 0 where the table grows by one (Hyyrö
2004, "Bit-parallel LCS-length computation revisited"), so a row costs a handful of long additions. Both are exact.
"""

from collections.abc import Hashable, Sequence

BLOCK = 1 << 15
"""Columns computed at once: few enough that the integers stay small when every token is another one."""


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable], block: int = BLOCK) -> int:
    """Length of the longest common subsequence; memory grows with the lengths, time with their product.

    >>> lcs_length("the cat sat on the mat".split(), "the cat on a mat".split())
    4
    """
    carries = bytearray(len(first))
    return sum(_columns(first, second[start : start + block], carries) for start in range(0, len(second), block))


def lcs_positions(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int]:
    """Where in `first` a longest common subsequence lies, in falling order: of several, the one that rouge_score takes.

    Memory is one bit for each pair of tokens.

    >>> lcs_positions("a b a".split(), "b a b".split())
    [1, 0]
    """
    rows = _rows(first, second)
    taken = []
    row, column = len(first), len(second)
    while row and column:
        if first[row - 1] == second[column - 1]:
            row, column = row - 1, column - 1
            taken.append(row)
        elif _length(rows[row], column - 1) > _length(rows[row - 1], column):
            column -= 1
        else:
            row -= 1
    return taken


def _columns(first: Sequence[Hashable], block: Sequence[Hashable], carries: bytearray) -> int:
    """How much these columns add to the length. `carries` holds what each row hands to the next block."""
    masks = _masks(first, block)
    width = len(block)
    full = unset = (1 << width) - 1
    for row, token in enumerate(first):
        mask, carry = masks.get(token, 0), carries[row]
        if mask or carry:
            hit = unset & mask
            grown = unset + hit
            if carry:
                grown += 1
            carries[row] = overflow = grown.bit_length() > width
            unset ^= hit
            unset |= grown
            if overflow:
                unset &= full
    return width - unset.bit_count()


def _rows(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int]:
    """The table's rows, from the empty beginning of `first` to all of it."""
    masks = _masks(first, second)
    full = unset = (1 << len(second)) - 1
    rows = [full]
    for token in first:
        if hit := unset & masks.get(token, 0):
            unset = ((unset + hit) | (unset - hit)) & full
        rows.append(unset)
    return rows


def _length(row: int, columns: int) -> int:
    """The table's entry: the length for a row's tokens and the first `columns` columns."""
    return columns - (row & ((1 << columns) - 1)).bit_count()


def _masks(first: Sequence[Hashable], second: Sequence[Hashable]) -> dict[Hashable, int]:
    """For each token of both: a bit for each of its columns."""
    places: dict[Hashable, list[int]] = {token: [] for token in set(first) & set(second)}
    for column, token in enumerate(second):
        if token in places:
            places[token].append(column)
    return {token: _bits(columns) for token, columns in places.items()}


def _bits(columns: list[int]) -> int:
    if len(columns) < 8:
        return sum(1 << column for column in columns)
    octets = bytearray(columns[-1] // 8 + 1)
    for column in columns:
        octets[column >> 3] |= 1 << (column & 7)
    return int.from_bytes(octets, "little")
