"""`rollcast/ToolQA-v0`: questions on countries that need a look-up and a calculator, called in the model's own format.

Owns the tools, the course of an episode and the rewards. Does not know how a call is written or arithmetic done
(`rollcast_envs.tools` does), nor what is asked: the built-in questions are in `tool_questions.py`, and what a record of
the user's holds in `tool_records.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollcast_envs.data.tools import FIELDS
from rollcast_envs.splits import portion_named
from rollcast_envs.tasks.multi_turn import MultiTurnTask, few_shot_examples, one_of
from rollcast_envs.tasks.tool_questions import KINDS, questions_of
from rollcast_envs.tasks.tool_records import Asked, TableQuestions
from rollcast_envs.tools import CalculationError, Call, Parsed, calculate, parse_calls

CALL_REWARD, MALFORMED = 0.1, -0.1


def lookup_tool(entry: str, about: str, **field: Any) -> dict[str, Any]:
    """The tool that looks up a fact about a country, or about an entry in a table of the user's."""
    properties = {
        entry: {"type": "string", "description": f"Name of the {entry}"},
        "field": {"type": "string", **field, "description": field.get("description", "What to look up")},
    }
    parameters = {"type": "object", "properties": properties, "required": [entry, "field"]}
    told = {"name": "lookup", "description": f"Looks up a fact about {about}.", "parameters": parameters}
    return {"type": "function", "function": told}


LOOKUP = lookup_tool("country", "a country", enum=list(FIELDS), description="What to look up; area is in km2")
LOOKUP_ENTRY = lookup_tool("entry", "an entry")
CALCULATE = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "Such as 12 * (3 + 4)"}},
            "required": ["expression"],
        },
    },
}

PROMPT = "Answer the question with the tools. When you know the answer, write only the answer."
TOOL_PROMPT = """You have two tools:
- lookup({entry}, field): looks up a fact about {what}.{fields}
- calculate(expression): calculates an arithmetic expression, such as 12 * (3 + 4).

To call a tool, write only its call, in this form:
<tool_call>
{{"name": "lookup", "arguments": {{"{entry}": "Atlantis", "field": "population"}}}}
</tool_call>
You are then told the result, such as: population of Atlantis: 1200"""
OF_COUNTRIES = {
    "entry": "country",
    "what": "a country",
    "fields": "\n  The field is population, area (in km2), capital, continent or currency.",
}
OF_ENTRIES = {"entry": "entry", "what": "an entry", "fields": ""}
"""What the tool prompt says of look-ups."""


@dataclass
class Progress:
    """How far an episode has come."""

    turns: int = 0
    calls: int = 0
    malformed: int = 0
    """Answers in which something that was meant as a call was none."""
    looked_up: bool = False
    calculated: bool = False


class ToolQAEnv(MultiTurnTask):
    """Questions that need facts and arithmetic; the model calls `lookup` and `calculate`, then answers.

    An answer with a call is not the final one: what the tools return is the next observation, with `role` "tool" in
    `info`. An answer without a call is final, and terminates the episode. After `max_turns` answers without a final one
    the episode is truncated. The facts are GeoNames'; the questions are made from them by a script, from 1,000 of each
    kind in the train split down to as many as the split's countries give. Countries are split 80 / 10 / 10, as in QA.

    Reward, in parts:
        - `calls`: 0.1 for the first look-up of a fact that the question needs, 0.1 for the first calculation that gives
          the number asked for.
        - `malformed`: -0.1 for each answer with a call that is broken, unknown, or lacks an argument.
        - `answer`: how right the final answer is, in [0, 1]. A number: 1 if the last number in the answer is within
          0.5 %. A name: token F1. "Which and by how many": half for the country named first, half for the number.

    With `data` the questions are yours, each with a table of its own: `lookup` then takes an `entry` of it and a
    `field`. See `rollcast_envs.tasks.tool_records` for what a record holds.

    Args:
        split: "train", "validation" or "test".
        kinds: which of density, difference, sum and capital to ask; None for all.
        max_turns: answers until the episode is cut short.
        tool_prompt: whether the system prompt describes the tools and shows a call, for models whose chat template
            does not tell them of `tools`.
        system_prompt: what the system turn says before that; None for nothing.
        few_shot: how many demonstrated episodes of the train split open every episode as examples, or the examples
            themselves as [[question, answer], ...]. In demonstrated ones, tools answer in the user's turns.
        data: your own questions, with the fields `question`, `references`, `table`, `needed` and optionally
            `expression`; None for the built-in ones.
        fields: which of your columns holds what, as {"question": "body"}.

    Raises:
        DataError: when the data cannot be read as this task needs them; it names file, line and field.
    """

    folds = True

    def __init__(
        self,
        split: str = "train",
        kinds: Sequence[str] | None = None,
        max_turns: int = 6,
        tool_prompt: bool = True,
        system_prompt: str | None = PROMPT,
        few_shot: int | Sequence[Sequence[str]] = 0,
        data: str | Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if max_turns < 1:
            raise ValueError(f"max_turns is {max_turns}; expected 1 or more")
        if data is not None and kinds is not None:
            raise ValueError(f"kinds is {kinds!r}; it chooses among the built-in questions, so leave it out with data")
        self.kinds = _valid_kinds(kinds) if data is None else ()
        self.questions: Sequence[Asked] = (
            questions_of(split, self.kinds) if data is None else TableQuestions(data, split, fields)
        )
        self.size = len(self.questions)
        self.max_turns = max_turns
        self.tools = (LOOKUP if data is None else LOOKUP_ENTRY, CALCULATE)
        told = TOOL_PROMPT.format(**(OF_COUNTRIES if data is None else OF_ENTRIES)) if tool_prompt else ""
        self.system_prompt = "\n\n".join(part for part in (system_prompt, told) if part) or None
        training = portion_named(split).training
        self.few_shot = few_shot_examples(few_shot, lambda: ToolQAEnv(training, kinds, data=data, fields=fields))
        self.question = self.questions[0]
        self.progress = Progress()

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        self.progress = Progress()
        if index is not None:
            self.question = self.questions[index]
            return self.question.phrasings[0], self._info()
        among = self.questions
        if self.kinds:
            kind = one_of(self.kinds, self.np_random)
            among = [question for question in self.questions if question.kind == kind]
        self.question = one_of(among, self.np_random)
        return one_of(self.question.phrasings, self.np_random), self._info()

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.progress.turns += 1
        parsed = parse_calls(answer)
        if not parsed.calls and not parsed.problems:
            return self._final(answer)
        rewards = {"calls": 0.0, "malformed": 0.0}
        results = self._run(parsed, rewards)
        truncated = self.progress.turns >= self.max_turns
        info = self._info() | {"rewards": rewards, "role": "tool"}
        if truncated:
            info["metrics"] = self._metrics(0.0)
        return "\n".join(results), sum(rewards.values()), False, truncated, info

    def demonstration(self) -> list[str]:
        """One look-up or calculation a turn, then the answer."""
        question = self.question
        entry, field = _required(self.tools[0])
        calls = [written("lookup", **{entry: name, field: wanted}) for name, wanted in question.look_ups]
        if question.expression:
            calls.append(written("calculate", expression=question.expression))
        return [*calls, question.references[0]]

    def _final(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        score = self.question.graded(answer)
        info = self._info() | {"rewards": {"answer": score}, "metrics": self._metrics(score)}
        return "", score, True, False, info

    def _run(self, parsed: Parsed, rewards: dict[str, float]) -> list[str]:
        """What the tools say to each call, and what is wrong with what is none."""
        results = []
        problems = [f"error: this call is malformed: {problem}" for problem in parsed.problems]
        for call in parsed.calls:
            problem = _misused(call, self.tools)
            if problem:
                problems.append(f"error: {problem}")
            else:
                self.progress.calls += 1
                results.append(
                    self._look_up(call, rewards) if call.name == "lookup" else self._calculate(call, rewards)
                )
        if problems:
            self.progress.malformed += 1
            rewards["malformed"] = MALFORMED
        return [*results, *problems]

    def _look_up(self, call: Call, rewards: dict[str, float]) -> str:
        name, field = (str(call.arguments[argument])[:100] for argument in _required(self.tools[0]))
        said, needed = self.question.look_up(name, field.strip().lower())
        if needed and not self.progress.looked_up:
            self.progress.looked_up = True
            rewards["calls"] += CALL_REWARD
        return said

    def _calculate(self, call: Call, rewards: dict[str, float]) -> str:
        expression = str(call.arguments["expression"])
        try:
            result = calculate(expression)
        except CalculationError as error:
            return f"error: {error}"
        if not self.progress.calculated and self.question.calculates(float(result)):
            self.progress.calculated = True
            rewards["calls"] += CALL_REWARD
        return result

    def _info(self) -> dict[str, Any]:
        question = self.question
        return {
            "task_id": question.id,
            "kind": question.kind,
            "references": question.references,
            "fields": question.fields,
        }

    def _metrics(self, score: float) -> dict[str, float]:
        progress = self.progress
        return {
            "correct": float(score == 1.0),
            "calls": float(progress.calls),
            "malformed": float(progress.malformed),
            "turns": float(progress.turns),
        }


def written(name: str, **arguments: str) -> str:
    """A call as the tool prompt shows it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _required(tool: Mapping[str, Any]) -> Sequence[str]:
    """The arguments of a tool."""
    names: Sequence[str] = tool["function"]["parameters"]["required"]
    return names


def _misused(call: Call, tools: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with the tool or the arguments of a call; "" if nothing."""
    known = {tool["function"]["name"]: _required(tool) for tool in tools}
    if call.name not in known:
        return f"there is no tool {call.name[:100]!r}; there are {', '.join(known)}"
    wanted = known[call.name]
    if set(call.arguments) != set(wanted):
        return f"{call.name} takes {' and '.join(wanted)}"
    if not all(isinstance(value, str | int | float) for value in call.arguments.values()):
        return f"the arguments of {call.name} are strings"
    return ""


def _valid_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    if kinds is None:
        return KINDS
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds is {kinds!r}; expected a list with some of {', '.join(KINDS)}, or None for all")
    return tuple(kinds)
