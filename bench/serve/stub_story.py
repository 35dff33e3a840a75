"""Owns what the stubs of `duomo bench gateway` say: a story without end, for each request from another place. Knows no wire and no client.

The request's seed picks the place, so that a gateway that mixes two streams up is found out; right is the tokenizer's own decoding.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from services.router.conversation import ChatMessage, Conversation
from services.router.text import ModelText

STORY = "Once upon a time there was a naïve fox 🦊 who liked tea. The fox said: “Hello, little bird!” and they were friends. "
STRIDE = 7  # tokens between the places of two seeds


class StubStory:
    """The tokens and the text of every request of a run, for the tokenizer of `model`."""

    def __init__(self, model: Path) -> None:
        self._text = ModelText.load(model)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        self._ids = self._text.encode(STORY, add_special_tokens=False)

    def token(self, seed: int, index: int) -> int:
        return self._ids[(STRIDE * seed + index) % len(self._ids)]

    def token_ids(self, seed: int, num_tokens: int) -> list[int]:
        return [self.token(seed, index) for index in range(num_tokens)]

    def text(self, seed: int, num_tokens: int) -> str:
        """By the tokenizers library alone."""
        return str(self._tokenizer.decode(self.token_ids(seed, num_tokens), skip_special_tokens=True))

    def pieces(self, seed: int, num_tokens: int) -> list[str]:
        """The text token by token, for a stub that speaks text itself."""
        detokenizer = self._text.detokenizer()
        pieces = [detokenizer.push(token_id) for token_id in self.token_ids(seed, num_tokens)]
        pieces[-1] += detokenizer.finish()
        return pieces

    def prompt(self, num_tokens: int) -> str:
        """One user's message that the chat template makes into exactly so many tokens."""
        for num_words in range(1, num_tokens):
            said = " ".join(["Tell me about a fox, a bird", *["and a tree"] * num_words])
            for ending in ("", ".", " too.", " and you too."):
                rendered = self._text.render(Conversation((ChatMessage("user", said + ending),)))
                if len(self._text.encode(rendered.text, add_special_tokens=False)) == num_tokens:
                    return said + ending
        raise ValueError(f"no message of {num_tokens} tokens was found")
