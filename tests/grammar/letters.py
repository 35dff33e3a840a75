"""A tokenizer of few tokens: ids 0 to 2 are special, 2 ends an answer; then one letter each, from "!" on, in ASCII's order."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from duomo.grammar.cache import TOKENIZER, compiled
from duomo.grammar.state import Grammar
from duomo.wire.values import Constraint

SPECIALS = ("<s>", "<x>", "</s>")
EOS = 2


def letter(token_id: int) -> str:
    return chr(ord("!") + token_id - len(SPECIALS))


def token_id(letter: str) -> int:
    return ord(letter) - ord("!") + len(SPECIALS)


def text(token_ids: list[int]) -> str:
    """Of an answer, its end left out."""
    return "".join(letter(token_id) for token_id in token_ids if token_id != EOS)


def write_tokenizer(folder: Path, vocab: int) -> Path:
    """Its tokenizer.json."""
    ids = {name: token_id for token_id, name in enumerate((*SPECIALS, *map(letter, range(len(SPECIALS), vocab))))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS))
    made.save(str(folder / TOKENIZER))
    return folder / TOKENIZER


def grammar(folder: Path, vocab: int, regex: str) -> Grammar:
    """Over these tokens."""
    return compiled((write_tokenizer(folder, vocab), vocab, (EOS,)), Constraint(kind="regex", text=regex))
