"""The probe's tokens: the same rows for every version of a run.

Owns: which tokens the engine and the learner are compared on. Does not know either of them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROW_TOKENS = 128
TEXT = """The river rises in the hills above the old town and runs for two hundred kilometres to the sea. In spring,
when the snow melts, it carries more water in a day than in the whole of August. People have built mills along it
since the twelfth century; nine of them still stand, and two still grind flour. A question was put to the council in
1897: should there be a bridge at the market, or a ferry? The engineer, Mrs. Ada Lindqvist, answered with a page of
figures. "A bridge costs 41,300 crowns," she wrote, "and a ferry 2,150 a year. Whoever expects the town to last twenty
years should build the bridge." They did, and it carries the road to the north to this day. Children learn to swim
below it, and anglers say that the best hour is the one before sunrise, from May to the end of September."""


def probe_tokens(tokenizer: Any, count: int) -> NDArray[np.int32]:
    """About `count` tokens of ordinary English as rows of equal length, at most 128 each."""
    length = min(count, ROW_TOKENS)
    rows = max(count // length, 1)
    ids = np.array(tokenizer.encode(TEXT, add_special_tokens=False), np.int32)
    # Row by row from a different place of the text, so that no two rows are the same.
    starts = np.arange(rows)[:, None] * max(len(ids) // rows, 1)
    tokens: NDArray[np.int32] = ids[(starts + np.arange(length)[None, :]) % len(ids)]
    return tokens
