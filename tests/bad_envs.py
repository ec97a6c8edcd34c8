"""Text environments with one mistake each, for `rollcast env check`. Importing registers them under `bad/`.

`bad/Good-v0` is the well-behaved one from which the others differ.
"""

import itertools
import os
import random
import time
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from rollcast_envs.text import TextEnv


class Good(TextEnv):
    """Three turns about a drawn number; each answer earns its length's share of ten."""

    size = 1000

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        self.number = self.drawn() if index is None else index
        self.info: dict[str, Any] = {"task_id": str(self.number), "kind": "good", "references": [str(self.number)]}
        return f"Say {self.number}.", self.info

    def drawn(self) -> int:
        return int(self.np_random.integers(1000))

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        over = self.turn == 3
        info = self.info | ({"metrics": {"turns": 3.0}} if over else {})
        return f"Again {self.number}.", float(answer == str(self.number)), over, False, info


class IgnoresSeed(Good):
    def drawn(self) -> int:
        return int.from_bytes(os.urandom(4), "big")


class DrawsFromProcess(Good):
    def drawn(self) -> int:
        return random.randrange(10**9)


class SeedsProcess(Good):
    def drawn(self) -> int:
        random.seed(int(self.np_random.integers(1000)))
        return random.randrange(10**9)


class CarriesOver(Good):
    def __init__(self) -> None:
        super().__init__()
        self.counter = itertools.count()

    def drawn(self) -> int:
        return super().drawn() * 1000 + next(self.counter)


class OneEpisode(Good):
    def drawn(self) -> int:
        return 7


class NeverEnds(Good):
    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "Go on.", 0.0, False, False, self.info


class RarelyEnds(Good):
    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "Go on.", 0.0, self.number % 2 == 0, False, self.info


class GoesOn(Good):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._episode_open = True
        return super().step(action)


class BadReferences(Good):
    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        question, info = super().begin(index)
        return question, info | {"references": str(self.number)}


class SmallObservations(Good):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Text(3)


class LettersOnly(Good):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = Text(100)


class NoSpaces(gymnasium.Env[str, str]):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return "Say anything.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, True, False, {}


class NeedsWords(Good):
    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.first = answer.split()[0]
        return super().respond(answer)


class AsciiOnly(Good):
    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.said = answer.encode("ascii")
        return super().respond(answer)


class HangsOnLong(Good):
    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if len(answer) > 5000:
            time.sleep(1.5)
        return super().respond(answer)


class Raises(Good):
    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        raise RuntimeError("the dice fell off the table")


class SeedByDefault(Good):
    def reset(self, *, seed: int | None = 3, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return super().reset(seed=seed, options=options)


class Prints(Good):
    def drawn(self) -> int:
        print("a debugging line")
        return super().drawn()


for _environment in (
    *(Good, IgnoresSeed, DrawsFromProcess, SeedsProcess, CarriesOver, OneEpisode, NeverEnds, RarelyEnds, GoesOn),
    *(BadReferences, SmallObservations, LettersOnly, NeedsWords, AsciiOnly, HangsOnLong, Raises),
    *(SeedByDefault, Prints),
):
    gymnasium.register(f"bad/{_environment.__name__}-v0", entry_point=_environment, disable_env_checker=True)
gymnasium.register("bad/NoSpaces-v0", entry_point=NoSpaces, disable_env_checker=True, order_enforce=False)
