"""Tokens to text and back: exact streams, stop strings, chat templates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from duomo.config import ModelSection
from duomo.errors import ModelError, RequestError
from services.router.conversation import ChatMessage, Conversation
from services.router.text import ModelText, StopScanner

FOLDER = Path(__file__).parents[3] / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def text() -> ModelText:
    return ModelText.load(FOLDER)


def _stream(text: ModelText, ids: list[int]) -> str:
    detokenizer = text.detokenizer()
    return "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.finish()


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 400), st.integers(0, 8191)), max_size=63))
def test_stream_of_any_ids_equals_the_tokenizers_decoding(ids: list[int]) -> None:
    text = ModelText.load(FOLDER) if not _CACHE else _CACHE[0]
    _CACHE[:] = [text]
    assert _stream(text, ids) == text._tokenizer.decode(ids, skip_special_tokens=True)


_CACHE: list[ModelText] = []


@settings(max_examples=100, deadline=None)
@given(words=st.text(max_size=40))
def test_text_survives_the_round_trip(words: str) -> None:
    text = ModelText.load(FOLDER) if not _CACHE else _CACHE[0]
    _CACHE[:] = [text]
    ids = text.encode(words, add_special_tokens=False)
    assert _stream(text, list(ids)) == text._tokenizer.decode(list(ids))


def test_a_character_across_tokens_is_held_back(text: ModelText) -> None:
    ids = text.encode("💙", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = text.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert pieces[:-1] == [""] * (len(ids) - 1) and pieces[-1] == "💙" and detokenizer.finish() == ""


def test_an_unfinished_character_ends_as_replacement(text: ModelText) -> None:
    ids = text.encode("💙", add_special_tokens=False)
    detokenizer = text.detokenizer()
    assert "".join(detokenizer.push(token_id) for token_id in ids[:-1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_are_silent_and_ids_beyond_the_vocabulary_too(text: ModelText) -> None:
    assert _stream(text, [2, 99_999, 0]) == ""
    assert text.token_bytes(2) == b"<|im_end|>" and text.token_bytes(99_999) == b""


def _reference_stop(whole: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """By definition, character by character: the occurrence that ends first, of those the longest."""
    for end in range(1, len(whole) + 1):
        starts = [end - len(stop) for stop in stops if whole[:end].endswith(stop)]
        if starts:
            return whole[: min(starts)], True
    return whole, False


@settings(max_examples=400, deadline=None)
@given(
    whole=st.text(alphabet="abc", max_size=24),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=8),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(whole: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(tuple(stops))
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    shown, has_stopped = "", False
    for low, high in zip(edges, edges[1:], strict=False):
        piece, has_stopped = scanner.push(whole[low:high])
        shown += piece
        assert whole.startswith(shown)
        if has_stopped:
            break
    if not has_stopped:
        shown += scanner.release()
    assert (shown, has_stopped) == _reference_stop(whole, tuple(stops))


def test_text_before_a_possible_stop_string_is_shown_at_once() -> None:
    scanner = StopScanner(("STOP",))
    assert scanner.push("hello ST") == ("hello ", False)
    assert scanner.push("ART") == ("START", False)
    assert scanner.push("S") == ("", False)
    assert scanner.push("TOP and more") == ("", True)


def test_chat_template_matches_transformers(text: ModelText) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    turns = [("system", "Be brief."), ("user", "Hi\n there "), ("assistant", "Hello."), ("user", "Why?")]
    mine = text.render(Conversation(tuple(ChatMessage(role, content) for role, content in turns))).text
    asked = [{"role": role, "content": content} for role, content in turns]
    assert mine == theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert list(text.encode(mine, add_special_tokens=False)) == theirs.encode(mine, add_special_tokens=False)


def test_a_template_is_sandboxed_and_its_refusal_names_messages(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    for source in ("{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.__mro__ }}"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
        with pytest.raises(RequestError) as caught:
            ModelText.load(tmp_path).render(Conversation((ChatMessage("user", "hi"),)))
        assert caught.value.param == "messages"


def test_a_folder_without_template_refuses_chat_and_a_broken_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer.json"):
        ModelText.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    with pytest.raises(RequestError, match="chat template"):
        ModelText.load(tmp_path).render(Conversation((ChatMessage("user", "hi"),)))
    spoiled = json.loads((FOLDER / "tokenizer.json").read_text())
    spoiled["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spoiled))
    with pytest.raises(ModelError, match="WordPiece"):
        ModelText.load(tmp_path)


def test_marks_that_a_tokenizer_calls_special_are_shown_for_whoever_reads_them(tmp_path: Path) -> None:
    source = json.loads((FOLDER / "tokenizer.json").read_text())
    added = source["added_tokens"][0]
    first = max(token["id"] for token in source["added_tokens"]) + 8192
    for number, content in enumerate(("<think>", "</think>", "<|other|>")):
        source["added_tokens"].append(added | {"id": first + number, "content": content, "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    text = ModelText.load(tmp_path)
    ids = list(text.encode("<think>so</think><|other|>it is", add_special_tokens=False))
    assert len({"<think>", "</think>", "<|other|>"} & {text.token_name(token_id) for token_id in ids}) == 3
    assert _stream(text, ids) == "<think>so</think>it is"


def lent(folder: Path, vocab_size: int) -> ModelText:
    return ModelText.of(ModelSection(path=folder, random_weights=True), vocab_size)


def test_a_model_of_drawn_weights_without_tokenizer_is_lent_the_embedded_one(tmp_path: Path, text: ModelText) -> None:
    other = lent(tmp_path, 50304)
    assert "tokenizer.json" in other.note and "8192" in other.note and str(tmp_path) in other.note
    words = "Tell me a story about a 💙 fox. <50303>"
    ids = other.encode(words, add_special_tokens=False)
    assert ids == text.encode(words, add_special_tokens=False) and max(ids) < text.vocab_size
    assert _stream(other, list(ids)) == words
    turns = Conversation((ChatMessage("user", "hi"),))
    assert other.render(turns) == text.render(turns)
    assert other.fewest_tokens(words) == text.fewest_tokens(words), "ids that nothing encodes to shorten no prompt"


def test_ids_that_a_lent_tokenizer_does_not_know_read_as_their_numbers(tmp_path: Path) -> None:
    text = lent(tmp_path, 50304)
    heart = list(text.encode("💙", add_special_tokens=False))
    assert _stream(text, [50303, 8192]) == "<50303><8192>"
    assert _stream(text, [*heart[:-1], 9000]) == "\ufffd<9000>", "bytes that end no character are given up where a number follows"
    assert text.token_bytes(50303) == b"<50303>" and text.token_bytes(50304) == b""
    assert text.token_bytes(2) == b"<|im_end|>" and _stream(text, [2]) == ""


def test_a_model_with_fewer_ids_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lent to .*ids up to 8191, but the model only 0 to 999 \(vocab_size\)"):
        lent(tmp_path, 1000)
    with pytest.raises(ModelError, match="ids up to 8191"):
        ModelText.of(ModelSection(path=FOLDER), 8191)


def test_nothing_is_lent_to_a_model_with_weights_or_with_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer.json"):
        ModelText.of(ModelSection(path=tmp_path), 50304)
    own = ModelText.of(ModelSection(path=FOLDER, random_weights=True), 50304)
    assert own.note == "" and own.token_bytes(50303) == b"", "ids beyond a model's own tokenizer are padding of its embeddings"


@settings(max_examples=60, deadline=None)
@given(words=st.text(max_size=200))
def test_the_early_length_check_never_overstates(words: str) -> None:
    text = ModelText.load(FOLDER) if not _CACHE else _CACHE[0]
    _CACHE[:] = [text]
    assert text.fewest_tokens(words) <= len(text.encode(words, add_special_tokens=False))


class _Turns:
    """How often the loop came round while a thing that is called ran, each time that it was called."""

    def __init__(self) -> None:
        self.during: list[int] = []
        self._num = 0

    def counted(self, call: Callable[..., object]) -> Callable[..., object]:
        def counting(*values: object, **named: object) -> object:
            before = self._num
            answer = call(*values, **named)
            self.during.append(self._num - before)
            return answer

        return counting

    async def while_awaiting(self, work: Coroutine[None, None, object]) -> object:
        async def tick() -> None:
            while True:
                self._num += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        try:
            return await work
        finally:
            ticker.cancel()


class _CountedTokenizer:
    """A tokenizer whose calls are counted."""

    def __init__(self, text: ModelText, turns: _Turns) -> None:
        self.encode, self.encode_batch = turns.counted(text._tokenizer.encode), turns.counted(text._tokenizer.encode_batch)


def test_the_loop_goes_on_while_a_long_text_is_encoded() -> None:
    """The tokenizer's own encode() would hold the interpreter to its end, on whichever thread it runs."""
    text, turns = ModelText.load(FOLDER), _Turns()
    words = "Once upon a time there was a naïve fox. " * 12_500
    expected = tuple(text._tokenizer.encode(words, add_special_tokens=False).ids)
    text._tokenizer = _CountedTokenizer(text, turns)  # type: ignore[assignment]  # it calls the real one
    assert asyncio.run(turns.while_awaiting(text.encode_aside(words, add_special_tokens=False))) == expected
    assert len(turns.during) == 1 and turns.during[0] > 100


@pytest.mark.parametrize("adds", [False, True])
def test_a_long_text_is_encoded_as_a_short_one(adds: bool) -> None:
    """Also by a tokenizer that puts special tokens before and behind."""
    text = ModelText.load(FOLDER)
    processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=_specials(text))
    text._tokenizer.post_processor = processor
    words = "a fox " * 4_000
    ids = text.encode(words, add_special_tokens=adds)
    assert ids == tuple(text._tokenizer.encode(words, add_special_tokens=adds).ids)
    assert (ids[0] == _specials(text)[0][1]) is adds
    with pytest.raises(RequestError, match="cannot be tokenised"):
        text.encode(words + "\ud800", add_special_tokens=adds)


def _specials(text: ModelText) -> list[tuple[str, int]]:
    return [(name, text._tokenizer.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")]


def test_the_loop_goes_on_while_many_tokens_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    text, turns = ModelText.load(FOLDER), _Turns()
    ids = list(range(400)) * 2_500
    expected = text.decode(ids)
    monkeypatch.setattr(text, "decode", turns.counted(text.decode))
    assert asyncio.run(turns.while_awaiting(text.decode_aside(ids))) == expected
    assert len(turns.during) == 1 and turns.during[0] > 5
