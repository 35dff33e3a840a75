"""What bytes tokens stand for: byte fallback beside the byte level that test_text.py streams; what is neither is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from duomo.errors import ModelError
from services.router.spelling import spelling_of
from services.router.text import ModelText

WORDS = ("\u2581", "\u2581Hello", "\u2581world", "\u2581a", "lo", "!", "é", "<0x", "H")
STRIP = decoders.Strip(" ", 1, 0)


def _tokenizer(*last: decoders.Decoder) -> Tokenizer:
    """As Mixtral's published one is made, with few words."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: 259 + at for at, word in enumerate(WORDS)}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def _text(tmp_path: Path, tokenizer: Tokenizer) -> ModelText:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return ModelText.load(tmp_path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return _text(tmp_path_factory.mktemp("fallback"), _tokenizer(STRIP))


def _stream(text: ModelText, ids: list[int]) -> str:
    detokenizer = text.detokenizer()
    return "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.finish()


@settings(max_examples=200, deadline=None)
@given(words=st.text(max_size=30))
def test_streams_equal_the_tokenizers_decoding(text: ModelText, words: str) -> None:
    ids = list(text.encode(words, add_special_tokens=False))
    assert _stream(text, ids) == text._tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.sampled_from([1, 2, *range(259, 259 + len(WORDS)), *range(3 + 32, 3 + 127)]), max_size=20))
def test_so_do_streams_of_any_words_and_valid_bytes(text: ModelText, ids: list[int]) -> None:
    assert _stream(text, ids) == text._tokenizer.decode(ids, skip_special_tokens=True)


def test_tokens_are_bytes_and_a_character_across_them_is_held_back(text: ModelText) -> None:
    ids = list(text.encode("💙 Hello", add_special_tokens=False))
    assert [text.token_bytes(token_id) for token_id in ids[:5]] == [b" ", b"\xf0", b"\x9f", b"\x92", b"\x99"]
    detokenizer = text.detokenizer()
    assert [detokenizer.push(token_id) for token_id in ids[:5]] == ["", "", "", "", "💙"]


def test_only_the_first_space_is_taken_away_and_only_where_the_tokenizer_says_so(text: ModelText, tmp_path: Path) -> None:
    hello, world, space = text._tokenizer.token_to_id("\u2581Hello"), text._tokenizer.token_to_id("\u2581world"), 259
    assert _stream(text, [1, hello, world]) == "Hello world" and _stream(text, [space, hello]) == " Hello"
    keeps = _text(tmp_path, _tokenizer())
    assert _stream(keeps, [hello, world]) == " Hello world" == keeps._tokenizer.decode([hello, world])


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    ],
)
def test_another_decoder_is_refused_by_file_and_name(decoder: decoders.Decoder) -> None:
    made = _tokenizer(STRIP)
    made.decoder = decoder
    with pytest.raises(ModelError, match=rf"some/tokenizer.json: decoder '{json.loads(made.to_str())['decoder']['type']}'.*ByteLevel"):
        spelling_of(made, Path("some/tokenizer.json"))
