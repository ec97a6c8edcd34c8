"""A request's prompt as token ids.

Owns: in which order a prompt is refused: far too long, not for this template, too long. Does not know engines or HTTP.

What a client wrote never becomes a control token (`rollcast.chat`); ids come from the codec alone. A tokenizer is no
thing for two threads: it holds in itself whether special tokens are split. Call this on one of them.
"""

from rollcast.chat import ChatCodec
from rollcast.live.openai_errors import ApiError, too_long
from rollcast.live.protocol import ChatRequest, CompletionRequest


def prompt_ids(asked: ChatRequest | CompletionRequest, codec: ChatCodec, context: int) -> list[int]:
    """At least one token to go on from, fewer than `context`. Raises `ApiError` (400) that names the field."""
    field = "messages" if isinstance(asked, ChatRequest) else "prompt"
    texts = [text for _, text in asked.turns] if isinstance(asked, ChatRequest) else [asked.text]
    fewest = sum(map(codec.fewest_tokens, texts))
    if fewest >= context:
        raise too_long(fewest, context, field, exact=False)
    try:
        ids = codec.converse(asked.turns) if isinstance(asked, ChatRequest) else codec.plain(asked.text)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}", field, "invalid_value") from None
    if not ids:
        raise ApiError(400, f"{field}: is empty, and this model has no token to begin with", field, "invalid_value")
    if len(ids) >= context:
        raise too_long(len(ids), context, field)
    return ids
