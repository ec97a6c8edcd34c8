"""Code of other packages, kept to itself: how it is imported, and its use of what a whole process shares.

Owns: the message for a package that is missing, the process's global random numbers while such code runs, and what it
prints. Does not know which package it is.
"""

import importlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from types import ModuleType

import numpy as np

from rollcast_envs.errors import DataError

UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What parsers and judges of answers raise over one that they did not expect, such as a number of 5,000 digits."""

_ALONE = RLock()


def required(module: str, package: str) -> ModuleType:
    """The module, of a package that rollcast does not install by itself. `package` is what pip is to install.

    Raises:
        DataError: when it cannot be imported; it tells what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module} cannot be imported", str(error), f"pip install '{package}'") from error


def silence(maker: type) -> None:
    """What the module of this class prints, such as its progress, goes nowhere from now on."""
    vars(sys.modules[maker.__module__]).setdefault("print", _say_nothing)


def _say_nothing(*values: object, **how: object) -> None:
    pass


class OwnRandomness:
    """The state of `random` and `numpy.random` that some code has to itself; the process's own state is put back.

    Code that draws from these gives equal episodes for equal seeds only so: other episodes run on other threads. Inside
    of `entered` is one thread at a time: nothing is to wait or to compute for long there.
    """

    def __init__(self, seed: int) -> None:
        self._states = random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with _ALONE:
            before = random.getstate(), np.random.get_state()
            _put(*self._states)
            try:
                yield
            finally:
                self._states = random.getstate(), np.random.get_state()
                _put(*before)


def _put(python: object, numpy: object) -> None:
    random.setstate(python)  # type: ignore[arg-type]
    np.random.set_state(numpy)  # type: ignore[arg-type]
