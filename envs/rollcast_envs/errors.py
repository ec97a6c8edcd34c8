"""Mistakes in what a user hands to an environment: its data, its rewards, its arguments.

Owns: how such a mistake is told (what / why / do this). Does not know who prints it: the service shows it without a
traceback, and from Python it is a `ValueError` like any other.
"""


class DataError(ValueError):
    """`what` is wrong (file, line and field by name), `why`, and what to do about it (`fix`)."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. Do this: {self.fix}"
