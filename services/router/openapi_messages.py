"""PURE: in the OpenAPI document, Anthropic's messages: the bodies, the answer and its errors. Knows no other endpoint.

What message_requests.py reads and message_answers.py writes; tests/services/router/test_openapi_*.py compare them.
"""

from __future__ import annotations

from services.router.openapi_fields import Limits, function, function_name, sampling, tokens
from services.router.openapi_words import (
    Schema,
    anything,
    array,
    boolean,
    either,
    free,
    given,
    integer,
    nullable,
    off,
    ref,
    taken,
    text,
    words,
)

_CACHE = "Ignored: this server caches by itself."


def message_schemas(limits: Limits) -> dict[str, Schema]:
    """Components by their names."""
    conversation = _conversation()
    required = {"model": limits.model, "messages": array(ref("Turn"), 1, about="The last one is the user's.")}
    optional = {
        **conversation,
        "stop_sequences": either(text(minLength=1), array(text(minLength=1), at_most=limits.max_stop_strings)),
        "output_config": taken({}, {"effort": off("high"), "format": _format()}),
        **sampling(limits),
        **{name: anything("Ignored.") for name in ("metadata", "service_tier", "cache_control")},
    }
    return {
        "MessageRequest": taken({**required, "max_tokens": tokens("The answer's length at most.")}, optional),
        "CountTokensRequest": taken(required, conversation),
        "Turn": _turn(),
        "TextBlock": _text_block(),
        "ToolResultBlock": _tool_result(),
        "MessageTool": _tool(),
        "Message": _answer(),
        "OutputBlock": _output_block(),
        "MessageUsage": given({name: integer() for name in _USAGE}),
        "MessageEvent": _event(),
        "MessageError": given({"type": words("error"), "error": given({"type": text(), "message": text()})}),
        "TokenCount": given({"input_tokens": integer(0)}),
    }


_USAGE = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")


def _conversation() -> dict[str, Schema]:
    parallel = {"disable_parallel_tool_use": boolean()}
    budget = integer(1024, 1 << 31, "Checked, and not enforced: `max_tokens` bounds the answer.")
    return {
        "system": _texts(),
        "tools": array(ref("MessageTool")),
        "tool_choice": either(
            taken({"type": words("auto", "any", "none")}, parallel), taken({"type": words("tool"), "name": text()}, parallel)
        ),
        "thinking": either(
            taken({"type": words("enabled")}, {"budget_tokens": budget}), taken({"type": words("adaptive", "disabled")}, {})
        ),
    }


def _texts() -> Schema:
    """A string or text parts, none of which need be there."""
    part = taken(
        {"type": words("text", "input_text"), "text": text()}, {name: anything("Ignored.") for name in ("cache_control", "citations")}
    )
    return either(text(), array(part))


def _turn() -> Schema:
    told = array(either(ref("TextBlock"), ref("ToolResultBlock")), 1)
    return either(
        taken({"role": words("user"), "content": either(text(), told)}, {}),
        taken({"role": words("assistant"), "content": either(text(), array(_assistant_block(), 1))}, {}),
    )


def _text_block() -> Schema:
    return taken({"type": words("text"), "text": text()}, {"cache_control": anything(_CACHE), "citations": anything("Ignored.")})


def _tool_result() -> Schema:
    optional = {"content": _texts(), "is_error": boolean(), "cache_control": anything(_CACHE)}
    return taken({"type": words("tool_result"), "tool_use_id": text()}, optional)


def _assistant_block() -> Schema:
    shared: dict[str, Schema] = {"cache_control": anything(_CACHE)}
    thought = {**shared, "signature": anything("Ignored."), "citations": anything("Ignored.")}
    return either(
        ref("TextBlock"),
        taken({"type": words("thinking"), "thinking": text()}, thought),
        taken({"type": words("tool_use"), "id": text(), "name": text()}, {"input": free(), **shared}),
    )


def _tool() -> Schema:
    described = function("input_schema")
    schema = described.pop("input_schema")
    optional = {**described, "type": words("custom"), "cache_control": anything(_CACHE)}
    return taken({"name": function_name(), "input_schema": schema}, optional)


def _format() -> Schema:
    return taken({"type": words("json_schema"), "schema": free("JSON Schema.")}, {})


def _stopped() -> dict[str, Schema]:
    reasons = words("end_turn", "max_tokens", "stop_sequence", "tool_use")
    return {"stop_reason": nullable(reasons), "stop_sequence": nullable(text())}


def _answer() -> Schema:
    head = {"id": text(), "type": words("message"), "role": words("assistant"), "model": text()}
    return given({**head, "content": array(ref("OutputBlock")), **_stopped(), "usage": ref("MessageUsage")})


def _output_block() -> Schema:
    return either(
        given({"type": words("text"), "text": text()}),
        given({"type": words("thinking"), "thinking": text(), "signature": text()}),
        given({"type": words("tool_use"), "id": text(), "name": text(), "input": free()}),
    )


def _event() -> Schema:
    """One of each kind that a stream has."""
    deltas = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
    written = [given({"type": words(kind), field: text()}) for kind, field in deltas.items()]
    kinds: dict[str, dict[str, Schema]] = {
        "message_start": {"message": ref("Message")},
        "ping": {},
        "content_block_start": {"index": integer(), "content_block": ref("OutputBlock")},
        "content_block_delta": {"index": integer(), "delta": either(*written)},
        "content_block_stop": {"index": integer()},
        "message_delta": {"delta": given(_stopped()), "usage": ref("MessageUsage")},
        "message_stop": {},
    }
    events = [given({"type": words(kind), **fields}) for kind, fields in kinds.items()]
    return either(*events, ref("MessageError"), about="The data of one event of the stream.")
