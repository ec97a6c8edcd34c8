"""Whether the number in a final answer is right: read from text, and compared within rounding.

Owns: how numbers are written, and the tolerance. Does not know questions.
"""

import re

TOLERANCE = 0.005
"""A number is right within this part of it, or within half a unit of the last place asked for."""
NUMBER = re.compile(
    r"(?<![\w.])([-−]?)(\d{1,3}(?:[,\u00a0\u202f ]\d{3})+(?!\d)|\d+)(\.\d+)?(?:\s*(thousand|million|billion)\b)?",
    re.IGNORECASE,
)
MULTIPLES = {"": 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9}
READ = 4000
"""Characters at the end of a final answer in which its number is looked for."""


def last_number(text: str) -> float | None:
    """The last number of a text; "1,234", "1 234" and "1.2 million" are understood.

    >>> last_number("It has 1,200 people, which is 3.5 per km2."), last_number("about 12.5 million")
    (3.5, 12500000.0)
    """
    found = None
    for found in NUMBER.finditer(text[-READ:]):  # noqa: B007  (the last one is meant)
        pass
    if found is None:
        return None
    sign, whole, decimals, multiple = found.groups(default="")
    return float(re.sub(r"\D", "", whole) + decimals) * MULTIPLES[multiple.lower()] * (-1 if sign else 1)


def near(number: float, wanted: float, slack: float) -> bool:
    """Whether two numbers are the same within `TOLERANCE`, or within `slack` where that is more."""
    return abs(number - wanted) <= max(TOLERANCE * abs(wanted), slack) * (1 + 1e-9)
