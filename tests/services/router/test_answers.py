"""Answers as bytes: both shapes are valid JSON with OpenAI's fields, odd tokens and odd numbers included."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from duomo.config import ModelSection
from duomo.errors import CapacityError, DeadlineError, EngineError, PeerError, RequestCancelled, RequestError
from duomo.wire.values import TokenLogprob
from services.router.answers import (
    DONE,
    AnswerHead,
    FinishedChoice,
    error_event,
    error_of,
    error_status,
    usage_object,
)
from services.router.chat_answers import ChatShape
from services.router.completion_answers import CompletionShape
from services.router.generation import EmittedPiece, TextEmitted, Usage
from services.router.text import ModelText
from tests.services.router.stub_system import loaded_text


def _head(**fields: bool) -> AnswerHead:
    told = {"shows_logprobs": True, "shows_token_ids": True, "includes_usage": True} | fields
    return AnswerHead(answer_id="id-1", model='tiny "moe"', text=loaded_text(), **told)


def _event(chunk: bytes) -> dict:
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.count(b"\n") == 2
    return json.loads(chunk[6:])


PART = loaded_text().encode("🦊", add_special_tokens=False)[0]
PIECE = EmittedPiece(PART, TokenLogprob(logprob=-math.inf, top=((PART, -math.inf), (500, -0.25))))


def test_odd_text_and_infinite_logprobs_stay_valid_json() -> None:
    for shape in (ChatShape(_head()), CompletionShape(_head())):
        for text in ("", 'a"b\n\\ \u2028 🦊 \x00'):
            event = _event(shape.chunk(TextEmitted(3, text, (PIECE,), None)))
            choice = event["choices"][0]
            assert choice.get("text", choice.get("delta", {}).get("content")) == text
            assert (choice["index"], choice["token_ids"], event["usage"], event["model"]) == (3, [PART], None, 'tiny "moe"')
    chat = _event(ChatShape(_head()).chunk(TextEmitted(0, "x", (PIECE,), "stop")))["choices"][0]
    entry = chat["logprobs"]["content"][0]
    assert entry["logprob"] == -9999.0 and bytes(entry["bytes"]) == loaded_text().token_bytes(PART) and "�" in entry["token"]
    text = _event(CompletionShape(_head()).chunk(TextEmitted(0, "x", (PIECE,), "length")))["choices"][0]
    assert text["logprobs"]["tokens"][0].startswith("bytes:\\x") and text["finish_reason"] == "length"


def test_ids_that_a_lent_tokenizer_does_not_know_are_named_in_logprobs(tmp_path: Path) -> None:
    head = replace(_head(), text=ModelText.of(ModelSection(path=tmp_path, random_weights=True), 50304))
    piece = EmittedPiece(50303, TokenLogprob(logprob=-1.0, top=((50303, -1.0), (9000, -2.0))))
    emitted = TextEmitted(0, "<50303>", (piece,), None)
    entry = _event(ChatShape(head).chunk(emitted))["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], bytes(entry["bytes"])) == ("<50303>", b"<50303>")
    assert [top["token"] for top in entry["top_logprobs"]] == ["<50303>", "<9000>"]
    logprobs = _event(CompletionShape(head).chunk(emitted))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<50303>"] and set(logprobs["top_logprobs"][0]) == {"<50303>", "<9000>"}


def test_a_completions_offsets_are_where_its_tokens_stand_in_the_text_that_is_shown() -> None:
    text = "a€漢b"
    ids = loaded_text().encode(text, add_special_tokens=False)
    assert len(ids) == 8, "each of both characters is three tokens"
    pieces = [EmittedPiece(token_id, TokenLogprob(logprob=-1.0, top=())) for token_id in ids]
    special = next(
        token_id
        for token_id in range(8192)
        if not loaded_text().detokenizer().push(token_id) and loaded_text().token_bytes(token_id).isascii()
    )
    pieces.insert(1, EmittedPiece(special, TokenLogprob(logprob=-1.0, top=())))
    wanted = [0, 1, 1, 1, 1, 2, 2, 2, 3]
    for echo in ("", "so: "):
        told = [place + len(echo) for place in wanted]
        echoes = (echo,) if echo else ()
        whole = json.loads(CompletionShape(_head(), echoes).whole([FinishedChoice(0, [text], list(pieces), "stop")], Usage(3, 9, None)))
        assert whole["choices"][0]["logprobs"]["text_offset"] == told
        shape, read, events = CompletionShape(_head(), echoes), loaded_text().detokenizer(), []
        for piece in pieces:
            events.append(_event(shape.chunk(TextEmitted(0, read.push(piece.token_id), (piece,), None))))
        assert "".join(event["choices"][0]["text"] for event in events) == text
        assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[place] for place in told]


def test_what_was_not_asked_for_is_not_shown() -> None:
    quiet = _head(shows_logprobs=False, shows_token_ids=False, includes_usage=False)
    event = _event(ChatShape(quiet).chunk(TextEmitted(0, "x", (), None)))
    assert "usage" not in event and "token_ids" not in event["choices"][0] and event["choices"][0]["logprobs"] is None
    assert CompletionShape(quiet).opening(0) == b""
    assert _event(ChatShape(quiet).opening(2))["choices"][0]["delta"]["role"] == "assistant"


def test_the_last_chunk_of_a_chat_has_an_empty_delta_where_no_text_is_left() -> None:
    assert _event(ChatShape(_head()).chunk(TextEmitted(0, "", (), "stop")))["choices"][0]["delta"] == {}


def test_whole_answers_and_usage() -> None:
    usage = Usage(3, 5, None)
    choice = FinishedChoice(0, ["a", "b"], [PIECE], "stop")
    for shape in (ChatShape(_head()), CompletionShape(_head())):
        answer = json.loads(shape.whole([choice], usage))
        assert answer["usage"] == usage_object(usage) and answer["usage"]["prompt_tokens_details"] is None
        assert answer["choices"][0].get("text", answer["choices"][0].get("message", {}).get("content")) == "ab"
        assert _event(shape.ending(usage).removesuffix(DONE))["choices"] == []


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("x", param="n"), 400, "invalid_request_error"),
        (RequestError("x", param="model", status=404), 404, "invalid_request_error"),
        (CapacityError("x", code="queue_full"), 429, "rate_limit_error"),
        (CapacityError("x"), 503, "service_unavailable_error"),
        (DeadlineError("x"), 408, "timeout_error"),
        (PeerError("x", code="deadline_exceeded"), 408, "timeout_error"),
        (PeerError("x"), 503, "service_unavailable_error"),
        (EngineError("x", retryable=False), 500, "server_error"),
        (RequestCancelled("x"), 499, "invalid_request_error"),
        (EngineError("x", code="constraint_not_kept", retryable=False), 400, "invalid_request_error"),
        (PeerError("x", code="bad_constraint"), 400, "invalid_request_error"),
    ],
)
def test_every_fault_has_its_status_and_openais_body(error: Exception, status: int, kind: str) -> None:
    assert error_status(error) == status
    body = json.loads(error_of(error))["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == kind
    assert error_event(error).endswith(b"data: [DONE]\n\n")
