"""Owns how a tokenizer spells text: what bytes a token stands for. Knows no stream, no model and no request.

    byte level       every byte is a printable character (GPT-2's alphabet): Qwen3, OLMoE, Llama 3, DeepSeek, gpt-oss
    byte fallback    words in UTF-8 with U+2581 for a space, and <0xAB> for a byte that no word holds (sentencepiece): Mixtral, Llama 2

With byte fallback a text starts with a space that was put there to be taken away again. Invalid bytes read as U+FFFD, one for each run that
cannot be a character; the library's decoder writes one for every byte of such a run, for which it needs the whole run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import tokenizers

from duomo.errors import ModelError

_FALLBACK_STEPS: Final = {"Replace", "ByteFallback", "Fuse", "Strip"}
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE: Final = "\u2581"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """strips_space: of a text that starts with a space, the first one is not part."""

    kind: Literal["byte level", "byte fallback"]
    strips_space: bool = False

    def pieces(self, tokenizer: tokenizers.Tokenizer) -> list[bytes]:
        """Each id's bytes; nothing for ids between that no token has."""
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        found = [b""] * (max(vocab.values(), default=-1) + 1)
        alphabet = _byte_alphabet()
        for token, token_id in vocab.items():
            found[token_id] = _by_alphabet(token, alphabet) if self.kind == "byte level" else _by_fallback(token)
        return found


def spelling_of(tokenizer: tokenizers.Tokenizer, file: Path) -> Spelling:
    """Raises ModelError naming the file and its decoder, where it is neither of the two."""
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    kind = decoder.get("type", "none")
    if kind == "ByteLevel":
        return Spelling(kind="byte level")
    steps = decoder.get("decoders", []) if kind == "Sequence" else []
    names = [step.get("type") for step in steps]
    if "ByteFallback" in names and set(names) <= _FALLBACK_STEPS and _replaces_space(steps):
        strips = [step for step in steps if step["type"] == "Strip"]
        if all((step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0) for step in strips):
            return Spelling(kind="byte fallback", strips_space=bool(strips))
    listed = f"'{kind}'" + (f" of {', '.join(map(str, names))}" if names else "")
    raise ModelError(
        f"{file}: decoder {listed} is not supported; byte-level tokenizers are (decoder 'ByteLevel'), "
        "and those with byte fallback (a 'Sequence' of Replace, ByteFallback, Fuse, Strip)"
    )


def _replaces_space(steps: list[dict[str, object]]) -> bool:
    replaced = [(step.get("pattern"), step.get("content")) for step in steps if step["type"] == "Replace"]
    return replaced == [({"String": _SPACE}, " ")]


def _by_alphabet(token: str, alphabet: dict[str, int]) -> bytes:
    """A token spelled outside the alphabet (an added one) stands for its own UTF-8, as in the library's decoder."""
    spelled = [alphabet.get(char) for char in token]
    known = [byte for byte in spelled if byte is not None]
    return bytes(known) if len(known) == len(spelled) else token.encode("utf-8")


def _by_fallback(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes as printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + idx): byte for idx, byte in enumerate(others)}
