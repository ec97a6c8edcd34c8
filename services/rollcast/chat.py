"""Text to tokens and back, through the model's own chat template.

Owns: how a conversation becomes token ids. Does not know environments, engines or rewards.

Token ids of answers come from the engine and are never tokenised again: a later turn is encoded alone and
appended. A template that rewrites what was said before (one that strips reasoning, say) cannot be appended
to; `extend` then returns None and the caller starts a new stream.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rollcast.config import ModelSection

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]
GUARD = "\ufdd0"
"""A code point that is no character. It breaks what looks like a special token wherever a person, an
environment or the policy wrote it, so that a rendered text holds none but the template's own."""


@dataclass(frozen=True)
class Conversation:
    """What the engine has seen so far: messages, and the text they were rendered to, both with guards."""

    messages: tuple[Message, ...]
    text: str
    tools: Tools = ()


class ChatCodec:
    """Wraps a Hugging Face tokenizer. Models without a chat template get plain text, one line a message."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._takes_tools = "tools" in str(tokenizer.chat_template or "")
        # Only this list is complete: SmolLM2's `<file_sep>` is not in `all_special_tokens`.
        added = {number: str(t) for number, t in tokenizer.added_tokens_decoder.items() if t.special}
        specials = sorted(added.values(), key=len, reverse=True)
        self._special_ids = frozenset(added)
        # Characters that the tokenizer does not know become a special token too, wherever they stand.
        self._control_ids = self._special_ids - {tokenizer.unk_token_id}
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    @classmethod
    def of(cls, model: ModelSection) -> "ChatCodec":
        """The codec of a run's model: with its own chat template, or with the one that the run names."""
        return cls.from_folder(model.path, model.trust_remote_code, model.chat_template)

    @classmethod
    def from_folder(cls, path: str, trust_remote_code: bool = False, chat_template: str | None = None) -> "ChatCodec":
        """`chat_template` names a Jinja file that replaces the model's template."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        return cls(tokenizer)

    def open(
        self, system: str | None, user: str, few_shot: Sequence[tuple[str, str]] = (), tools: Tools = ()
    ) -> tuple[Conversation, list[int]]:
        """A new conversation, and the token ids that ask for its first answer.

        Tools are told by the model's own template; one that does not know tools leaves them out.
        """
        messages = [self._message("system", system)] if system else []
        for question, answer in few_shot:
            messages += [self._message("user", question), self._message("assistant", answer)]
        messages.append(self._message("user", user))
        told = tools if self._takes_tools else ()
        text = self._render(messages, told)
        return Conversation(tuple(messages), text, told), self._encode(text)

    def reopen(self, conversation: Conversation) -> list[int]:
        """Token ids of a whole conversation, for a new stream."""
        return self._encode(conversation.text)

    def extend(
        self, conversation: Conversation, answer_ids: Sequence[int], observation: str, role: str = "user"
    ) -> tuple[Conversation, list[int] | None]:
        """The conversation after `answer_ids` and what the environment says next, and the ids to append (or None).

        `role` is "tool" for what a tool returned; a template that knows no tools gets it as the user's turn.
        """
        answer = self._message("assistant", self.answer(answer_ids))
        said = self._message(role if self._takes_tools else "user", observation)
        messages = (*conversation.messages, answer, said)
        text = self._render(messages, conversation.tools)
        before = conversation.text + answer["content"]
        after = Conversation(messages, text, conversation.tools)
        if not text.startswith(before):
            return after, None
        suffix = self._encode(text[len(before) :])
        # The engine already sampled the token that ends an answer; the template writes it too.
        if answer_ids and suffix and suffix[0] == answer_ids[-1] and suffix[0] in self._special_ids:
            suffix = suffix[1:]
        return after, suffix

    def converse(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """The token ids that ask for the next answer, after `turns` of (role, text) that somebody else kept.

        Raises `ValueError` with the template's own words when it refuses such a conversation.
        """
        from jinja2 import TemplateError

        try:
            text = self._render([self._message(role, content) for role, content in turns])
        except TemplateError as error:
            raise ValueError(error.message or "the model's chat template refuses it") from None
        return self._encode(text)

    def plain(self, text: str) -> list[int]:
        """The token ids of a text to go on from, without a template; the tokenizer's own opening token included."""
        ids: list[int] = self.tokenizer.encode(text, split_special_tokens=True)
        return ids

    def fewest_tokens(self, text: str) -> int:
        """What `text` takes at the least; for free, where encoding it would take seconds."""
        return len(text) // self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        """Most characters of one token; a vocabulary of bytes holds a character for each of them."""
        return max(map(len, self.tokenizer.get_vocab()))

    def answer(self, token_ids: Sequence[int]) -> str:
        """The answer as an environment sees it: without special tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def answer_ids(self, text: str) -> list[int]:
        """A reference as the policy would have sampled it: its tokens, and the one that ends an answer."""
        return [*self._encode_plain(text), self._end_of_answer]

    @cached_property
    def _end_of_answer(self) -> int:
        """What the template writes after an answer, if that is a special token; else the tokenizer's own end."""
        asked = [self._message("user", "?")]
        answered = [*asked, self._message("assistant", "!")]
        before, after = self._render(asked), self._render(answered)
        if after.startswith(before + "!"):
            suffix = self._encode(after[len(before) + 1 :])
            if suffix and suffix[0] in self._special_ids:
                return suffix[0]
        return int(self.tokenizer.eos_token_id)

    def _render(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        if self.tokenizer.chat_template is None:
            return "".join(message["content"] + "\n" for message in messages)
        told = {"tools": [dict(tool) for tool in tools]} if tools else {}
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **told
        )
        return text

    def _message(self, role: str, content: str) -> Message:
        typed = content.replace(GUARD, "")
        return {"role": role, "content": self._special.sub(lambda m: m[0][0] + GUARD + m[0][1:], typed)}

    def _encode(self, text: str) -> list[int]:
        """Special tokens are recognised in the template's text only, never where a guard stands.

        Some tokenizers find them in normalised text (`＜|im_start|＞` in full width): more of them than there are
        in `text` were typed.
        """
        if GUARD not in text:
            whole: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
            if sum(number in self._control_ids for number in whole) == len(self._special.findall(text)):
                return whole
        ids: list[int] = []
        start = 0
        for special in self._special.finditer(text):
            ids += self._encode_plain(text[start : special.start()])
            ids += self.tokenizer.encode(special[0], add_special_tokens=False)
            start = special.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(
            text.replace(GUARD, ""), add_special_tokens=False, split_special_tokens=True
        )
        return ids


def stop_token_ids(path: str, trust_remote_code: bool = False) -> list[int]:
    """The tokens that end an answer, each the last of its answer: the generation config's, else the model config's."""
    from transformers import AutoConfig, GenerationConfig

    try:
        stops = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # transformers' word for "there is no generation_config.json".
        stops = None
    if stops is None:
        stops = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).eos_token_id
    if stops is None:
        return []
    return list(stops) if isinstance(stops, list) else [int(stops)]
