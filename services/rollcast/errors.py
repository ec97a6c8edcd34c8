"""What can go wrong, as a tree; the exit code of the command stands beside each.

RollcastError             1   base: everything below is told in three lines, without a traceback
├── UsageError            2   the command line asks for something that cannot be
├── ConfigError           2   the configuration, or the machine it is to run on, does not fit
├── RunFailed             1   a run that had begun cannot go on
└── RunDiverged           3   the numeric guard stopped the run

Owns: how an error is told (what / why / do this) and its exit code. Does not know who raises or prints it.
Ctrl-C is `KeyboardInterrupt` (130). Any other exception is a bug of rollcast and keeps its traceback.
"""

from collections.abc import Sequence
from typing import ClassVar, Self


class RollcastError(Exception):
    """`what` happened, `why`, and what to do about it (`fix`)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        # All three go to `args`, so that the error survives pickling on its way out of a Ray actor.
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return f"{self.what}\nwhy: {self.why}\ndo this: {self.fix}"

    @classmethod
    def join(cls, title: str, problems: Sequence[tuple[str, str, str]]) -> Self:
        """One error that lists several; of a single one it says just that."""
        if len(problems) == 1:
            what, why, fix = problems[0]
            return cls(f"{title}: {what}", why, fix)
        reasons = [f"{number}. {what}: {why}" for number, (what, why, _) in enumerate(problems, 1)]
        fixes = [f"{number}. {fix}" for number, (_, _, fix) in enumerate(problems, 1)]
        return cls(
            f"{title}: {len(problems)} things do not fit",
            "\n  ".join(["", *reasons]),
            "\n  ".join(["", *fixes]),
        )


class UsageError(RollcastError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class ConfigError(RollcastError):
    """The configuration, or the machine it is to run on, does not fit."""

    exit_code = 2


class RunFailed(RollcastError):
    """A run that had begun cannot go on."""


class RunDiverged(RollcastError):
    """The numeric guard stopped the run: too many steps in a row were not finite."""

    exit_code = 3
