"""`rollcast/TextArena-v0`: the games for one player of the package textarena that need neither network nor key.

Owns: the form of turns (only what is new), and what a game's end is worth. Does not know any game's rules.
"""

from collections.abc import Mapping
from typing import Any

from rollcast_envs.adapters.outside import UNREADABLE, OwnRandomness, required, silence
from rollcast_envs.errors import DataError
from rollcast_envs.splits import SPLITS, Split, valid_split
from rollcast_envs.text import TextEnv

PACKAGE = "textarena==0.7.4"
GAME = -1
"""Who speaks where TextArena's messages come from the game."""
OFFLINE = (
    *("2048", "Bandit", "Blackjack", "Countdown", "Crosswords", "Cryptarithm", "FifteenPuzzle", "FrozenLake"),
    *("GuessTheNumber", "LightsOut", "LogicPuzzle", "Mastermind", "Minesweeper", "PegJump", "RushHour", "Secretary"),
    *("Set", "Slitherlink", "Sudoku", "ThreeCardMonte", "TowerOfHanoi"),
)
"""Games for one player that start with nothing but the package."""


class TextArenaEnv(TextEnv):
    """Games for one player from TextArena, such as GuessTheNumber, Mastermind, Minesweeper, Sudoku and 2048.

    A game is drawn with its seed, and there are endlessly many. Games of two splits never start from the same seed; a
    game of few starts, such as GuessTheNumber, repeats them all the same.

    The reward comes with the last turn: the game's own, mostly 1 for a game won and a share of it before. A move that
    the game cannot even read ends it like a second illegal one in a row, with reward 0.

    Args:
        game: an id of TextArena, such as "GuessTheNumber-v0", "Mastermind-v0" or "FrozenLake-v0-random".
        split: "train", "validation" or "test".
        options: the game's own options, such as {"max_number": 50}.
        system_prompt: the system turn of every episode; None for none: the first turn tells the rules.

    Raises:
        DataError: when textarena is missing, or the game is none that can be played here.
    """

    def __init__(
        self,
        game: str = "GuessTheNumber-v0",
        split: Split = "train",
        options: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.system_prompt = system_prompt
        self._name, self._split = game, SPLITS.index(valid_split(split))
        self._randomness = OwnRandomness(0)
        self._game = _made(game, dict(options or {}), self._randomness)
        self._inner = _unwrapped(self._game)
        silence(type(self._inner))
        self._turns = 0
        self._info: dict[str, Any] = {}

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        seed = int(self.np_random.integers(2**30)) // len(SPLITS) * len(SPLITS) + self._split
        self._turns = 0
        self._info = {"task_id": f"{self._name}:{seed}", "kind": self._name, "references": []}
        self._randomness = OwnRandomness(seed)
        with self._randomness.entered():
            self._game.reset(num_players=1, seed=seed)
            return self._news(), self._info

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._turns += 1
        with self._randomness.entered():
            try:
                done, _ = self._game.step(answer)
            except UNREADABLE:
                return self._end(0.0, True, "This move cannot be read.")
            if not done:
                return self._news(), 0.0, False, False, self._info
            rewards, told = self._game.close()
        score, invalid = (rewards or {}).get(0, 0.0), bool(told[0].get("invalid_move"))
        if isinstance(score, str):  # Three games hand over the reward and the reason of an illegal move the wrong way.
            return self._end(0.0, invalid, score)
        return self._end(float(score), invalid, str(told[0].get("reason") or ""))

    def _end(self, score: float, invalid: bool, reason: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        solved, moves = float(score >= 1.0), float(self._turns)
        metrics = {"score": score, "solved": solved, "invalid_move": float(invalid), "moves": moves}
        return reason, score, True, False, self._info | {"metrics": metrics}

    def _news(self) -> str:
        """What the game has said since the last turn. The player's own move, which is repeated, is left out."""
        _, messages = self._inner.get_observation()
        return "\n".join(text for sender, text, _ in messages if sender == GAME) or "Your move."


def _made(game: str, options: dict[str, Any], randomness: OwnRandomness) -> Any:
    if game.partition("-v")[0] not in OFFLINE:
        why = "it is no game for one player that can be played without a network"
        raise DataError(f"game is {game!r}", why, f"use one of {', '.join(f'{name}-v0' for name in OFFLINE)}")
    textarena = required("textarena", PACKAGE)
    known = sorted(name for name in textarena.envs.registration.ENV_REGISTRY if name.partition("-v")[0] in OFFLINE)
    if game not in known:
        alike = [name for name in known if name.partition("-v")[0] == game.partition("-v")[0]]
        raise DataError(f"game is {game!r}", "textarena has no game of this id", f"use one of {', '.join(alike)}")
    try:
        with randomness.entered():
            return textarena.make(game, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"options of {game} are refused", str(error), "correct them, or leave them out") from error


def _unwrapped(game: Any) -> Any:
    """The game below TextArena's wrappers: those repeat the whole story every turn, which a conversation holds."""
    while "env" in vars(game):
        game = game.env
    return game
