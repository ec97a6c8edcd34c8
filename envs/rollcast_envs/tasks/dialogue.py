"""`rollcast/Dialogue-v0`: help a scripted customer find a place in Cambridge, over several turns.

Owns the goals, the customer's behaviour and the rewards. Does not know how places and utterances were chosen
(`rollcast_envs.data.dialogue` does) nor how an answer is understood (`rollcast_envs.tasks.clerk` does).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np

from rollcast_envs.data.dialogue import CONSTRAINTS, REQUESTS, Place, load_places, load_templates
from rollcast_envs.splits import Split, in_split, portion_named, position
from rollcast_envs.tasks.clerk import ask, heard_values, inform, offer, understand
from rollcast_envs.tasks.multi_turn import MultiTurnTask, few_shot_examples, one_of, some

HEARD = 4000
"""Characters of an answer that the customer listens to."""
MATCHES = 4
"""At most so many places fulfil a goal."""
CANDIDATES = range(4, 9)
SLOT_REWARD, OFFER_REWARD, VALUE_REWARD, WRONG_OFFER = 0.2, 0.4, 0.2, -0.1

NO_PREFERENCE = {
    "area": ("I do not mind which part of town.", "Anywhere in town is fine."),
    "price": ("I do not mind about the price.", "Any price range is fine."),
    "food": ("I do not mind what food they serve.", "Any food is fine."),
    "stars": ("I do not mind how many stars it has.", "The star rating does not matter."),
    "type": ("I do not mind what type of place it is.", "The type does not matter."),
}
UNFIT = ("That is not what I am looking for.", "That does not fit.", "No, not that one.")
LOST = ("Sorry, I did not follow.", "I am still looking.", "Can you help me with that?")
GIVE_UP = ("Never mind, I will look elsewhere. Goodbye.", "This is not helping. Goodbye.")
"""What the customer says where MultiWOZ has no words for it; these are rollcast's own."""

PROMPT = (
    "You are a clerk who helps customers find a place in Cambridge. The first message lists the places you know. Ask "
    "what the customer wants, offer one place that fits by its name, then tell what the customer asks. Be brief."
)
Cell = tuple[str, str, tuple[str, ...]]
"""Role, domain and slots."""
NOT_OF_THE_CENTRE = re.compile(r"\{area\} (?:side|end|cambridge)", re.IGNORECASE)


@dataclass(frozen=True)
class Goal:
    """What the customer wants: a place that has `constraints`, and then the values of `requested`."""

    id: str
    group: str
    """Domain and constraints: what splits are made by."""
    domain: str
    constraints: Mapping[str, str]
    requested: tuple[str, ...]
    matches: tuple[Place, ...]
    """The places that fulfil it, 1 to `MATCHES`."""


@dataclass
class Episode:
    """One customer: the hidden goal, and how far the conversation has come."""

    goal: Goal
    table: tuple[Place, ...]
    draw: np.random.Generator
    opening: tuple[str, ...]
    """Constraints told in the first turn."""
    questions: list[tuple[str, ...]]
    """What will be asked about the place, turn by turn."""
    told: set[str] = field(default_factory=set)
    """Slots on which the customer has spoken, whether to name a value or to have no preference."""
    found: set[str] = field(default_factory=set)
    """Constraints that came out because the model asked."""
    place: Place | None = None
    """The fitting place that was offered."""
    given: set[str] = field(default_factory=set)
    turns: int = 0
    idle: int = 0
    """Answers in a row that led to nothing new."""
    wrong_offers: int = 0

    def missing(self) -> list[str]:
        return [slot for slot in self.goal.requested if slot not in self.given]


class DialogueEnv(MultiTurnTask):
    """A customer with a hidden goal: find out what is wanted, offer a place, tell what is asked about it.

    The first turn lists the places that the model may offer, with all that is known of them, and then what the customer
    says; it tells some of two or three constraints. The customer answers questions, turns down what does not fit, asks
    for one to three values of the place, and leaves. Goals (their constraints) and utterances are split 80 / 10 / 10:
    none is in two splits. For k-fold validation goals are cut into parts; utterances are those of train throughout,
    which are too few to say everything in every part.

    How an answer is understood, by rule and without case or punctuation:
        - It offers the places of the list that it names. If one of them does not fit, the offer is wrong.
        - It asks for a slot where a sentence that ends in "?", and that names no place, has one of the slot's words.
          An answer that offers asks for nothing.
        - Its first 4,000 characters count.
        - It gives a value of the place agreed on where that value occurs and no other listed place's value does.

    Reward, in parts:
        - `slots`: 0.2 for each constraint that the customer tells because the model asked.
        - `offer`: 0.4 when a fitting place is first offered; `wrong_offer`: -0.1 for each offer that does not fit.
        - `values`: 0.2 for each requested value, once.
        - `turn`: -`turn_cost` for each answer.

    The end: terminated when all is told (`success` 1), or when the customer gives up after `patience` answers in a row
    that led to nothing new; truncated after `max_turns` answers, with the customer's words to the last of them.

    Args:
        split: "train", "validation" or "test".
        max_turns: answers until the episode is cut short.
        candidates: places on the list, 4 to 8, among which are all that fulfil the goal.
        patience: answers in a row without progress that the customer bears.
        turn_cost: reward lost for each answer.
        system_prompt: the system turn of every episode; None for none.
        few_shot: how many demonstrated episodes of the train split open every episode as examples, or the examples
            themselves as [[question, answer], ...].
    """

    folds = True

    def __init__(
        self,
        split: str = "train",
        max_turns: int = 10,
        candidates: int = 6,
        patience: int = 3,
        turn_cost: float = 0.02,
        system_prompt: str | None = PROMPT,
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        super().__init__()
        _check_limits(max_turns, candidates, patience, turn_cost)
        portion = portion_named(split)
        self.goals = some(goals_of(split), "goals", split)
        self.customer = Customer(portion.split)
        self.size = len(self.goals)
        self.max_turns, self.candidates, self.patience = max_turns, candidates, patience
        self.turn_cost = turn_cost
        self.system_prompt = system_prompt
        self.few_shot = few_shot_examples(few_shot, lambda: DialogueEnv(portion.training, max_turns, candidates))
        self.episode = self._open(self.goals[0], 0)

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        if index is None:
            index = int(self.np_random.integers(len(self.goals)))
            seed = int(self.np_random.integers(2**63))
        else:
            seed = position(self.goals[index].id)
        self.episode = self._open(self.goals[index], seed)
        said = self.customer.opens(self.episode)
        return f"{listing(self.episode.table)}\n\nCustomer: {said}", self._info()

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        episode = self.episode
        episode.turns += 1
        rewards = dict.fromkeys(("slots", "offer", "wrong_offer", "values"), 0.0) | {"turn": -self.turn_cost}
        said = self._hear(episode, answer[:HEARD], rewards)
        progress = rewards["slots"] + rewards["offer"] + rewards["values"] > 0 or said.news
        episode.idle = 0 if progress else episode.idle + 1
        done = episode.place is not None and not episode.missing()
        terminated = done or episode.idle >= self.patience
        truncated = not terminated and episode.turns >= self.max_turns
        words = self.customer.leaves(episode, done) if terminated else said.words
        info = self._info() | {"rewards": rewards}
        if terminated or truncated:
            info["metrics"] = metrics(episode, done)
        return words, sum(rewards.values()), terminated, truncated, info

    def demonstration(self) -> list[str]:
        """Asks for every slot of the domain that the customer left open, offers the place, tells what is asked."""
        episode = self.episode
        draw = np.random.default_rng(position(episode.goal.id))
        domain = episode.goal.domain
        unknown = [slot for slot in CONSTRAINTS[domain] if slot not in episode.opening]
        place = next(place for place in episode.table if place in episode.goal.matches)
        questions = [ask(domain, slot, draw) for slot in unknown]
        return [*questions, offer(place, draw), *(inform(place, slots, draw) for slots in episode.questions)]

    def _hear(self, episode: Episode, answer: str, rewards: dict[str, float]) -> "Reply":
        """Takes in one answer: books what it is worth, and returns what the customer says to it."""
        heard = understand(answer, episode.goal.domain, episode.table)
        if episode.place is None and heard.named:
            if any(place not in episode.goal.matches for place in heard.named):
                rewards["wrong_offer"] = WRONG_OFFER
                episode.wrong_offers += 1
                return self.customer.turns_down(episode, heard.named)
            episode.place = heard.named[0]
            rewards["offer"] = OFFER_REWARD
        if episode.place is not None:
            new = heard_values(answer, episode.place, episode.table, episode.missing())
            episode.given |= new
            rewards["values"] = VALUE_REWARD * len(new)
            return self.customer.asks(episode)
        new_slots = {slot for slot in heard.asked if slot in episode.goal.constraints and slot not in episode.told}
        episode.found |= new_slots
        rewards["slots"] = SLOT_REWARD * len(new_slots)
        return self.customer.answers(episode, heard.asked)

    def _open(self, goal: Goal, seed: int) -> Episode:
        draw = np.random.default_rng(seed)
        table = draw_table(goal, self.candidates, draw)
        opening = self.customer.draw_opening(goal, draw)
        return Episode(goal, table, draw, opening, self.customer.draw_questions(goal, draw), told=set(opening))

    def _info(self) -> dict[str, Any]:
        goal = self.episode.goal
        return {
            "task_id": goal.id,
            "kind": goal.domain,
            "references": [place.name for place in goal.matches],
            "fields": {"constraints": dict(goal.constraints), "requested": list(goal.requested)},
        }


@dataclass(frozen=True)
class Reply:
    """The customer's next words, and whether they tell something new."""

    words: str
    news: bool = False


class Customer:
    """Says what a goal needs, in the words of one split's templates."""

    def __init__(self, split: Split) -> None:
        self._templates = templates_of(split)

    def draw_opening(self, goal: Goal, draw: np.random.Generator) -> tuple[str, ...]:
        """The constraints to open with: some, never all, and such as there are words for."""
        slots = tuple(goal.constraints)
        parts = [part for size in range(1, len(slots)) for part in combinations(slots, size)]
        return one_of([part for part in parts if self._found("open", goal.domain, part)], draw)

    def draw_questions(self, goal: Goal, draw: np.random.Generator) -> list[tuple[str, ...]]:
        """What to ask about a place, cut into turns."""
        order = [goal.requested[at] for at in draw.permutation(len(goal.requested))]
        turns = []
        while order:
            size = int(draw.integers(1, len(order) + 1))
            part = tuple(slot for slot in goal.requested if slot in order[:size])
            turns.append(part if self._found("request", "", part) else (order[0],))
            order = [slot for slot in order if slot not in turns[-1]]
        return turns

    def opens(self, episode: Episode) -> str:
        return self._say(episode, "open", episode.opening)

    def answers(self, episode: Episode, asked: Sequence[str]) -> Reply:
        """Answers questions; says again what is already known if nothing was asked."""
        news = not episode.told.issuperset(asked)
        episode.told |= set(asked)
        if not asked:
            again = one_of(sorted(episode.told & episode.goal.constraints.keys()), episode.draw)
            return Reply(f"{one_of(LOST, episode.draw)} {self._tells(episode, again)}")
        return Reply(" ".join(self._tells(episode, slot) for slot in asked), news)

    def turns_down(self, episode: Episode, named: Sequence[Place]) -> Reply:
        """Says which constraint the first unfit place does not fulfil."""
        wanted = episode.goal.constraints
        unfit = next(place for place in named if place not in episode.goal.matches)
        slot = one_of([slot for slot, value in wanted.items() if unfit.slots[slot] != value], episode.draw)
        episode.told.add(slot)
        return Reply(f"{one_of(UNFIT, episode.draw)} {self._tells(episode, slot)}")

    def asks(self, episode: Episode) -> Reply:
        """Asks for the next values; nothing once all are given."""
        missing = episode.missing()
        for part in episode.questions:
            left = tuple(slot for slot in part if slot in missing)
            if left:
                return Reply(self._say(episode, "request", left if self._found("request", "", left) else left[:1]))
        return Reply("")

    def leaves(self, episode: Episode, content: bool) -> str:
        return self._say(episode, "bye", ()) if content else one_of(GIVE_UP, episode.draw)

    def _tells(self, episode: Episode, slot: str) -> str:
        if slot not in episode.goal.constraints:
            return one_of(NO_PREFERENCE[slot], episode.draw)
        return self._say(episode, "tell", (slot,))

    def _say(self, episode: Episode, role: str, slots: tuple[str, ...]) -> str:
        domain = episode.goal.domain if role in ("open", "tell") else ""
        known = self._found(role, domain, slots) or self._found("open", domain, slots)
        values = episode.goal.constraints
        fit = [text for text in known if values.get("area") != "centre" or not NOT_OF_THE_CENTRE.search(text)]
        return fill(one_of(fit or known, episode.draw), values)

    def _found(self, role: str, domain: str, slots: tuple[str, ...]) -> Sequence[str]:
        return self._templates.get((role, domain, slots), ())


def fill(text: str, values: Mapping[str, str]) -> str:
    """The template with its values, and the article that goes with each.

    >>> fill("I want an {price} room in the {area}.", {"price": "cheap", "area": "east"})
    'I want a cheap room in the east.'
    """

    def article(match: re.Match[str]) -> str:
        value = values[match[2]]
        vowel = value[0] in "aeiou" and not value.startswith("eu")
        return f"{match[1]}{'n' if vowel else ''} {{{match[2]}}}"

    return re.sub(r"\b([Aa])n? \{(\w+)\}", article, text).format_map(values)


def listing(table: Sequence[Place]) -> str:
    """One place a line, with all that is known of it."""
    lines = [
        f"- {place.name}: " + "; ".join(f"{slot} {value}" for slot, value in place.slots.items()) for place in table
    ]
    return "\n".join(["Places:", *lines])


def metrics(episode: Episode, success: bool) -> dict[str, float]:
    hidden = len(episode.goal.constraints) - len(episode.opening)
    return {
        "success": float(success),
        "slots": len(episode.found) / hidden,
        "offer": float(episode.place is not None),
        "values": len(episode.given) / len(episode.goal.requested),
        "wrong_offers": float(episode.wrong_offers),
        "turns": float(episode.turns),
    }


def draw_table(goal: Goal, size: int, draw: np.random.Generator) -> tuple[Place, ...]:
    """Every place that fulfils the goal and, up to `size`, others of the domain: sooner those that nearly fit."""
    others = [place for place in load_places() if place.domain == goal.domain and place not in goal.matches]

    def nearness(place: Place) -> int:
        return sum(place.slots[slot] == value for slot, value in goal.constraints.items())

    ranks = [nearness(place) + 1.5 * chance for place, chance in zip(others, draw.random(len(others)), strict=True)]
    best = sorted(range(len(others)), key=lambda at: -ranks[at])[: size - len(goal.matches)]
    rows = [*goal.matches, *(others[at] for at in best)]
    return tuple(rows[at] for at in draw.permutation(len(rows)))


@cache
def goals_of(split: str) -> tuple[Goal, ...]:
    """The goals of a split or of a part of train, shuffled once and for all, so that every prefix mixes the domains."""
    chosen = [goal for domain in CONSTRAINTS for goal in goals_in(domain) if in_split(goal.group, split)]
    return tuple(sorted(chosen, key=lambda goal: position(goal.id)))


def goals_in(domain: str) -> Iterator[Goal]:
    """Every set of two or three constraints that 1 to `MATCHES` places fulfil, with every one to three requests."""
    places = [place for place in load_places() if place.domain == domain]
    for slots in (part for size in (2, 3) for part in combinations(CONSTRAINTS[domain], size)):
        for values in sorted({tuple(place.slots[slot] for slot in slots) for place in places}):
            constraints = dict(zip(slots, values, strict=True))
            matches = tuple(place for place in places if all(place.slots[s] == v for s, v in constraints.items()))
            if len(matches) <= MATCHES:
                group = f"goal:{domain}:" + ",".join(f"{slot}={value}" for slot, value in constraints.items())
                known = [slot for slot in REQUESTS[domain] if all(slot in place.slots for place in matches)]
                for requested in (part for size in (1, 2, 3) for part in combinations(known, size)):
                    yield Goal(f"{group}?{','.join(requested)}", group, domain, constraints, requested, matches)


@cache
def templates_of(split: Split) -> Mapping[Cell, Sequence[str]]:
    """The texts of a split by role, domain and slots."""
    cells: dict[Cell, list[str]] = {}
    for template in load_templates():
        if in_split(template.group, split):
            cells.setdefault((template.role, template.domain, template.slots), []).append(template.text)
    return cells


def _check_limits(max_turns: int, candidates: int, patience: int, turn_cost: float) -> None:
    if max_turns < 1 or patience < 1:
        raise ValueError(f"max_turns is {max_turns} and patience {patience}; expected 1 or more of each")
    if candidates not in CANDIDATES:
        raise ValueError(f"candidates is {candidates}; expected {CANDIDATES[0]} to {CANDIDATES[-1]} places")
    if not (isfinite(turn_cost) and turn_cost >= 0):
        raise ValueError(f"turn_cost is {turn_cost}; expected a finite number that is not negative")
