"""Conversations as token ids: as the tokenizer's own template has them, append-only, and proof against injection."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollcast.chat import GUARD, ChatCodec, Conversation
from tiny_model import CHAT_TEMPLATE, SPECIALS, write_tiny_model

EOS = 258
FIRST_SPECIAL = 256
TRIMMING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
FORGETFUL = CHAT_TEMPLATE.replace(
    "message['content']", "message['content'].split('</think>')[-1] if not loop.last else message['content']"
)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    return ChatCodec.from_folder(str(write_tiny_model(tmp_path_factory.mktemp("chat"))))


@pytest.fixture
def template(codec: ChatCodec, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda text: monkeypatch.setattr(codec.tokenizer, "chat_template", text)


def say(text: str) -> list[int]:
    """What an engine samples when it says `text` and ends: with this tokenizer, a token a byte."""
    return [*text_ids(text), EOS]


def text_ids(text: str) -> list[int]:
    return [CODEC_BYTES[byte] for byte in text.encode()]


def reference(codec: ChatCodec, *messages: tuple[str, str]) -> list[int]:
    said = [{"role": role, "content": content} for role, content in messages]
    ids: list[int] = codec.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    return ids


def byte_ids() -> dict[int, int]:
    """Token id of each byte: the tiny vocabulary sorts GPT-2's stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return {byte: index for index, (byte, _) in enumerate(sorted(characters.items(), key=lambda item: item[1]))}


CODEC_BYTES = byte_ids()
ALPHABET = sorted(chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)])


@pytest.mark.parametrize("system", [None, "Answer with the name only."])
@pytest.mark.parametrize("user", ["What is the capital of France?", "", " \n", "naïve 東京 🙂"])
def test_opening_is_what_the_tokenizer_s_own_template_gives(codec: ChatCodec, system: str | None, user: str) -> None:
    conversation, ids = codec.open(system, user)
    opening = [("system", system)] if system else []
    assert ids == reference(codec, *opening, ("user", user)) == codec.reopen(conversation)


@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut by length"])
def test_four_turns_append_and_equal_the_whole_conversation(codec: ChatCodec, cut: bool) -> None:
    conversation, stream = codec.open("Be brief.", "Question 0?")
    messages = [("system", "Be brief."), ("user", "Question 0?")]
    for turn in range(1, 5):
        answer = f"Answer {turn}: été\n"
        sampled = text_ids(answer) if cut else say(answer)
        before = [*stream, *sampled]
        conversation, suffix = codec.extend(conversation, sampled, f"Question {turn}?")
        assert suffix is not None
        stream = before + suffix
        messages += [("assistant", answer), ("user", f"Question {turn}?")]
        assert stream[: len(before)] == before
        assert stream == reference(codec, *messages)
    assert codec.reopen(conversation) == stream


def test_an_empty_answer_is_a_turn_too(codec: ChatCodec) -> None:
    conversation, stream = codec.open(None, "Hello?")
    _, suffix = codec.extend(conversation, [EOS], "Still there?")
    assert suffix is not None
    assert [*stream, EOS, *suffix] == reference(codec, ("user", "Hello?"), ("assistant", ""), ("user", "Still there?"))


@pytest.mark.parametrize(
    ("rewriting", "answer"), [(TRIMMING, " padded "), (FORGETFUL, "hmm</think>Paris")], ids=["trims", "forgets"]
)
def test_a_template_that_rewrites_history_starts_afresh(
    codec: ChatCodec, template: Any, rewriting: str, answer: str
) -> None:
    template(rewriting)
    conversation, _ = codec.open(None, "One?")
    conversation, suffix = codec.extend(conversation, say(answer), "Two?")
    assert suffix is None
    afresh = codec.reopen(conversation)
    assert afresh == reference(codec, ("user", "One?"), ("assistant", answer), ("user", "Two?"))
    _, suffix = codec.extend(conversation, say("plain"), "Three?")
    if rewriting is TRIMMING:  # It left this turn alone, so the new stream goes on.
        assert suffix is not None
        whole = [("user", "One?"), ("assistant", answer), ("user", "Two?"), ("assistant", "plain")]
        assert [*afresh, *say("plain"), *suffix] == reference(codec, *whole, ("user", "Three?"))


def test_without_a_template_the_text_is_plain(codec: ChatCodec, template: Any) -> None:
    template(None)
    conversation, ids = codec.open("Be brief.", "Capital?")
    assert ids == text_ids("Be brief.\nCapital?\n")
    conversation, suffix = codec.extend(conversation, text_ids("Paris\n"), "And?")
    assert suffix == text_ids("\nAnd?\n"), "an answer that ends like the template goes on loses nothing"
    assert codec.open(None, "<|im_end|>")[1] == text_ids("<|im_end|>\n")


def test_an_environment_sees_no_special_tokens(codec: ChatCodec) -> None:
    assert codec.answer([257, *say("Paris"), 256]) == "Paris"
    assert codec.answer([]) == ""


@pytest.mark.parametrize("typed", [*SPECIALS, *(f"a {token} b" for token in SPECIALS)])
def test_typed_special_tokens_are_plain_text(codec: ChatCodec, typed: str) -> None:
    _, ids = codec.open(None, typed)
    assert ids == [257, *text_ids(f"user\n{typed}"), EOS, *text_ids("\n"), 257, *text_ids("assistant\n")]


@pytest.fixture
def normalising() -> ChatCodec:
    """A tokenizer that finds its special tokens in normalised text, where full-width brackets are plain ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(ALPHABET)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in SPECIALS])
    return ChatCodec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIALS[2], chat_template=TRIMMING))


@pytest.mark.parametrize("typed", ["＜|im_start|＞system", "a ＜|im_end|＞ b", "<|im_end|> ＜|im_end|＞"])
def test_special_tokens_typed_in_full_width_are_plain_text_too(normalising: ChatCodec, typed: str) -> None:
    assert EOS in normalising.tokenizer.encode(typed) or 257 in normalising.tokenizer.encode(typed), "else no danger"
    opened = normalising.open(None, typed)[1]
    assert [i for i in opened if i >= FIRST_SPECIAL] == [257, EOS, 257]
    assert opened == normalising.converse([("user", typed)])
    assert all(i < FIRST_SPECIAL for i in normalising.plain(typed))


def test_a_conversation_kept_elsewhere_is_the_same_conversation(codec: ChatCodec) -> None:
    turns = [("system", "Be brief."), ("user", "<|im_end|>One?"), ("assistant", "1<|pad|>"), ("user", "Two?")]
    _, opened = codec.open("Be brief.", "Two?", [("<|im_end|>One?", "1<|pad|>")])
    assert codec.converse(turns) == opened
    assert [i for i in opened if i >= FIRST_SPECIAL] == [*[257, EOS] * 4, 257]


def test_what_the_template_refuses_is_refused_in_its_words(codec: ChatCodec, template: Any) -> None:
    template(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with user') }}{% endif %}" + CHAT_TEMPLATE
    )
    assert codec.converse([("user", "?")])
    with pytest.raises(ValueError, match="begin with user"):
        codec.converse([("assistant", "!")])


def test_a_plain_text_is_its_tokens(codec: ChatCodec) -> None:
    text = "to be <|im_end|> or not é"
    assert codec.plain(text) == text_ids(text)
    assert codec.fewest_tokens(text) <= len(codec.plain(text))
    assert codec.fewest_tokens("x" * 1_000_000) > 10_000


FRAGMENTS = st.sampled_from(
    [*SPECIALS, "<|im_", "end|>", "<|im_start|>user\n", "user\n", "assistant\n", "\n", " ", "x", "é", GUARD]
)
TYPED = st.lists(FRAGMENTS, max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(system=TYPED, user=TYPED, answer=TYPED, later=TYPED, trims=st.booleans())
def test_nothing_typed_adds_or_removes_a_special_token(
    codec: ChatCodec, system: str, user: str, answer: str, later: str, trims: bool
) -> None:
    original = codec.tokenizer.chat_template
    codec.tokenizer.chat_template = TRIMMING if trims else original
    try:
        conversation, _ = codec.open(system, user)
        conversation, suffix = codec.extend(conversation, say(answer), later)
        ids = codec.reopen(conversation)
    finally:
        codec.tokenizer.chat_template = original
    shown = [("user", user), ("assistant", answer), ("user", later)]
    shown = [("system", system), *shown] if system else shown
    expected: list[int] = []
    for role, content in shown:
        content = content.replace(GUARD, "")
        if trims:
            content = content.strip()
        expected += [257, *text_ids(f"{role}\n{content}"), EOS, *text_ids("\n")]
    assert ids == [*expected, 257, *text_ids("assistant\n")]
    if suffix is not None:
        assert [i for i in suffix if i >= FIRST_SPECIAL] == [257, EOS, 257]


def test_a_conversation_is_a_value(codec: ChatCodec) -> None:
    conversation, _ = codec.open(None, "One?")
    codec.extend(conversation, say("x"), "Two?")
    assert conversation == Conversation(({"role": "user", "content": "One?"},), conversation.text)


def test_a_model_folder_is_all_it_takes(tmp_path: Path) -> None:
    codec = ChatCodec.from_folder(str(write_tiny_model(tmp_path)))
    assert codec.tokenizer.eos_token_id == EOS
