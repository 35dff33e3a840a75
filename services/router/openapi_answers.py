"""PURE: in the OpenAPI document, what chat completions and completions answer, errors, models and tokens. Knows no body.

What chat_answers.py, completion_answers.py, answers.py and tokenizing.py write; tests/services/router/test_openapi_answers.py
holds their answers to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from services.router.openapi_words import Schema, array, boolean, either, free, given, integer, nullable, number, ref, text, words


def answer_schemas() -> dict[str, Schema]:
    """Components by their names."""
    return {
        "Error": given({"error": given({"message": text(), "type": text(), "param": nullable(text()), "code": nullable(text())})}),
        "Usage": _usage(),
        "ChatCompletion": _whole("chat.completion", _chat_choice(), _prompt_logprobs()),
        "ChatCompletionChunk": _chunk("chat.completion.chunk", _chat_delta()),
        "Completion": _whole("text_completion", _completion_choice(ended=True)),
        "CompletionChunk": _chunk("text_completion", _completion_choice(ended=False)),
        "ChatLogprobs": _chat_logprobs(),
        "CompletionLogprobs": _completion_logprobs(),
        "PromptLogprobs": _scored_prompt(),
        "ToolCall": given({"id": text(), "type": words("function"), "function": given({"name": text(), "arguments": text()})}),
        "Model": _model(),
        "ModelList": given({"object": words("list"), "data": array(ref("Model"))}),
        "Tokens": given(
            {"count": integer(0), "max_model_len": integer(1), "tokens": array(integer(0)), "token_strs": nullable(array(text()))}
        ),
        "Prompt": given({"prompt": text()}),
    }


def _usage() -> Schema:
    cached = nullable(given({"cached_tokens": integer(0)}))
    counts = {name: integer(0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return given({**counts, "prompt_tokens_details": cached}, about="Cached tokens are those read from a prefix cache.")


def _head(kind: str) -> dict[str, Schema]:
    return {"id": text(), "object": words(kind), "created": integer(about="Seconds since 1970."), "model": text()}


def _whole(kind: str, choice: Schema, optional: Mapping[str, Schema] = MappingProxyType({})) -> Schema:
    return given({**_head(kind), "choices": array(choice, 1), "usage": ref("Usage")}, optional)


def _chunk(kind: str, choice: Schema) -> Schema:
    """usage: null but in the last chunk, which has no choices, where stream_options ask for it."""
    chunk = given({**_head(kind), "choices": array(choice)}, {"usage": nullable(ref("Usage"))})
    return either(chunk, ref("Error"), about="The data of one event; the last event is `[DONE]`.")


def _finish(*more: str) -> Schema:
    return words("stop", "length", *more)


def _token_ids() -> dict[str, Schema]:
    """With return_token_ids."""
    return {"token_ids": array(integer(0))}


def _chat_choice() -> Schema:
    said: dict[str, Schema] = {"reasoning_content": text(), "tool_calls": array(ref("ToolCall"), 1)}
    message = given({"role": words("assistant"), "content": nullable(text()), "refusal": {"type": "null"}}, said)
    fields = {"index": integer(0), "message": message, "finish_reason": _finish("tool_calls")}
    return given({**fields, "logprobs": nullable(ref("ChatLogprobs"))}, _token_ids())


def _chat_delta() -> Schema:
    called = given({"arguments": text()}, {"name": text()})
    call = given({"index": integer(0), "function": called}, {"id": text(), "type": words("function")})
    delta = given({}, {"role": words("assistant"), "content": text(), "reasoning_content": text(), "tool_calls": array(call, 1)})
    fields = {"index": integer(0), "delta": delta, "finish_reason": nullable(_finish("tool_calls"))}
    return given({**fields, "logprobs": nullable(ref("ChatLogprobs"))}, _token_ids())


def _completion_choice(*, ended: bool) -> Schema:
    finish = _finish() if ended else nullable(_finish())
    fields = {"index": integer(0), "text": text(), "finish_reason": finish}
    return given({**fields, "logprobs": nullable(ref("CompletionLogprobs"))}, _token_ids() | (_prompt_logprobs() if ended else {}))


def _chat_logprobs() -> Schema:
    token: dict[str, Schema] = {"token": text(), "logprob": number(high=0), "bytes": array(integer(0, 255))}
    entry = given({**token, "top_logprobs": array(given(token))})
    return given({"content": array(entry), "refusal": {"type": "null"}})


def _completion_logprobs() -> Schema:
    """One of each list for a token. text_offset counts characters of the choice. null: of an echoed prompt's first token."""
    ranked: Schema = {"type": "object", "additionalProperties": number(high=0)}
    values, tops = array(nullable(number(high=0))), array(nullable(ranked))
    return given({"tokens": array(text()), "token_logprobs": values, "top_logprobs": tops, "text_offset": array(integer(0))})


def _prompt_logprobs() -> dict[str, Schema]:
    """With prompt_logprobs."""
    return {"prompt_logprobs": ref("PromptLogprobs")}


def _scored_prompt() -> Schema:
    """By token ids: the token itself, then the likeliest. null: of the first token."""
    shown = given({"logprob": number(high=0), "rank": integer(1), "decoded_token": text()})
    return array(nullable({"type": "object", "additionalProperties": shown}), 1)


def _model() -> Schema:
    head: dict[str, Schema] = {"id": text(), "object": words("model"), "created": integer(), "owned_by": text(), "root": text()}
    sizes = ("max_model_len", "context_length", "vocab_size", "total_parameters", "active_parameters", "num_experts", "experts_per_token")
    return given({**head, **{name: integer(0) for name in sizes}, "fingerprint": text()})


def report_schemas(report: Schema) -> dict[str, Schema]:
    """What operators read. report: of one replica, by its type on the wire."""
    replica: dict[str, Schema] = {
        **{name: text() for name in ("replica_id", "boot_id", "role", "address")},
        "rtt_s": nullable(number(0)),
        "report_age_s": nullable(number(0)),
        **{name: integer(0) for name in ("gateway_legs", "gateway_queued_tokens", "gateway_reserved_blocks", "num_prefixes")},
        "report": nullable(report),
    }
    held = ("num_live_requests", "num_open_answers", "num_waiting_requests", "num_live_legs", "num_open_spans")
    gateway: dict[str, Schema] = {
        "replica_id": text(),
        "boot_id": text(),
        "pid": integer(1),
        **{name: integer(0) for name in held},
        "is_directory_reachable": boolean(),
        "is_draining": boolean(),
        "dropped_tokens": {"type": "object", "additionalProperties": integer(0)},
    }
    desired = given({"prefill": integer(0), "decode": integer(0)})
    pools = given({"replicas": array(given(replica)), "gateway": given(gateway), "desired_replicas": desired})
    return {
        "Health": given({"status": words("live", "ready")}),
        "PoolReport": pools,
        "ExpertReport": given({"pools": {"type": "object", "additionalProperties": free("Lists by layer.")}}),
    }
