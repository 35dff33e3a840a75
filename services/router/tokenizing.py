"""/tokenize and /detokenize: their bodies, checked, and their answers, as vLLM has them. Knows no HTTP, and generates nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from duomo.errors import RequestError
from services.router.conversation import Conversation
from services.router.fields import wrong_type
from services.router.model_card import ModelCard
from services.router.openai import RequestParser
from services.router.text import THREAD_CHARS, THREAD_TOKENS, ModelText


class Tokenizing:
    """Both endpoints for one served model. A prompt may be longer than the model's context: that is what counting is for."""

    def __init__(self, parser: RequestParser, card: ModelCard, text: ModelText) -> None:
        self._parser = parser
        self._card = card
        self._text = text
        self._one_long_text = asyncio.Lock()  # texts longer than any prompt come here: a thread stays for prompts

    async def tokenize(self, body: bytes) -> bytes:
        """{count, max_model_len, tokens, token_strs} of a `prompt`, or of `messages` as the chat template renders them."""
        fields = self._parser.fields(body, needs_model=False)
        prompt = fields.string("prompt")
        is_chat = prompt is None
        if prompt is None:
            if not fields.has("messages"):
                raise RequestError("You must provide a 'prompt' or 'messages'.", param="prompt", code="missing_required_parameter")
            conversation = self._parser.conversation(fields)
            has_generation_prompt = fields.boolean("add_generation_prompt", default=True)
            prompt = self._text.render(conversation, add_generation_prompt=has_generation_prompt).text
        add_special_tokens = fields.boolean("add_special_tokens", default=not is_chat)
        shows_strings = fields.boolean("return_token_strs")
        fields.finish()
        ids = await self._encode(prompt, add_special_tokens)
        names = [self._text.token_name(token_id) for token_id in ids] if shows_strings else None
        return msgspec.json.encode({"count": len(ids), "max_model_len": self._card.context_tokens, "tokens": ids, "token_strs": names})

    async def detokenize(self, body: bytes) -> bytes:
        """{prompt} of `tokens`, special ones included."""
        fields = self._parser.fields(body, needs_model=False)
        values = fields.take("tokens")
        fields.finish()
        if not isinstance(values, list):
            raise wrong_type("tokens", "an array of token ids", values)
        ids = self._parser.token_ids("tokens", values)
        async with self._one_long_text if len(ids) >= THREAD_TOKENS else contextlib.nullcontext():
            return msgspec.json.encode({"prompt": await self._text.decode_aside(ids)})

    async def count(self, conversation: Conversation) -> bytes:
        """{input_tokens}, as Anthropic has it."""
        ids = await self._encode(self._text.render(conversation).text, False)
        return msgspec.json.encode({"input_tokens": len(ids)})

    async def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        async with self._one_long_text if len(text) >= THREAD_CHARS else contextlib.nullcontext():
            return await self._text.encode_aside(text, add_special_tokens=add_special_tokens)
