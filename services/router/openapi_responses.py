"""PURE: in the OpenAPI document, OpenAI's responses: the body and the answer. Knows no other endpoint.

What response_requests.py reads and response_answers.py writes; tests/services/router/test_openapi_*.py compare them.
"""

from __future__ import annotations

from services.router.openapi_fields import Limits, function, function_name, ignored, sampling, stop, template, tokens
from services.router.openapi_words import (
    Schema,
    anything,
    array,
    boolean,
    either,
    free,
    given,
    integer,
    nothing,
    nullable,
    number,
    off,
    ref,
    taken,
    text,
    words,
)


def response_schemas(limits: Limits) -> dict[str, Schema]:
    """Components by their names."""
    return {
        "ResponseRequest": _request(limits),
        "ResponseItem": _item(),
        "ResponsePart": _part(),
        "ResponseTool": taken({"type": words("function"), "name": function_name()}, function("parameters")),
        "ResponseToolChoice": either(words("auto", "none", "required"), taken({"type": words("function"), "name": text()}, {})),
        "ResponseFormat": _format(),
        "Response": _answer(),
        "ResponseOutputItem": _output_item(),
        "ResponseUsage": _usage(),
        "ResponseEvent": _event(),
    }


def _request(limits: Limits) -> Schema:
    optional = {
        "instructions": text("A system turn before the input."),
        "max_output_tokens": tokens("The answer's length at most."),
        "stop": stop(limits),
        "tools": array(ref("ResponseTool")),
        "tool_choice": ref("ResponseToolChoice"),
        "parallel_tool_calls": boolean(),
        "text": taken({}, {"format": ref("ResponseFormat"), "verbosity": off("medium")}),
        "reasoning": taken(
            {},
            {
                "effort": words("none", "medium", about="none: no thinking, where the template can; medium: as the model does."),
                "summary": anything("Ignored: reasoning is shown whole."),
                "generate_summary": anything("Ignored."),
            },
        ),
        "include": array(words("reasoning.encrypted_content"), about="Changes nothing."),
        "metadata": free("Given back."),
        **template(),
        **sampling(limits),
        **ignored("prompt_cache_options", "max_tool_calls"),
        "background": off(False),
        "conversation": off(),
        "previous_response_id": off(),
        "prompt": off(),
        "store": off(False),
        "top_logprobs": off(0),
        "truncation": off("disabled"),
    }
    return taken({"model": limits.model, "input": either(text(), array(ref("ResponseItem"), 1))}, optional)


def _item() -> Schema:
    parts = either(text(), array(ref("ResponsePart"), 1))
    shared = {name: anything("Ignored.") for name in ("id", "status", "phase")}
    told = either(text(), array(ref("ResponsePart")))
    role = words("user", "assistant", "system", "developer")
    arguments = text("A JSON object.", contentMediaType="application/json")
    thought = {"content": told, "summary": anything("Ignored."), "encrypted_content": anything("Ignored.")}
    return either(
        taken({"role": role, "content": parts}, {"type": words("message"), **shared}),
        taken({"type": words("function_call"), "call_id": text(), "name": text()}, {"arguments": arguments, **shared}),
        taken({"type": words("function_call_output"), "call_id": text(), "output": parts}, shared),
        taken({"type": words("reasoning")}, {**thought, **shared}),
    )


def _part() -> Schema:
    """annotations and logprobs: of what the server wrote, sent back as it came."""
    written = {name: anything("Ignored.") for name in ("annotations", "logprobs")}
    return either(
        taken({"type": words("input_text", "text"), "text": text()}, {}),
        taken({"type": words("output_text", "reasoning_text"), "text": text()}, written),
    )


def _format() -> Schema:
    names = {name: anything("Ignored.") for name in ("name", "description", "strict")}
    return either(
        taken({"type": words("text", "json_object")}, {}),
        taken({"type": words("json_schema"), "schema": free("JSON Schema.")}, names),
    )


def _answer() -> Schema:
    echo: dict[str, Schema] = {
        "instructions": nullable(text()),
        "max_output_tokens": nullable(integer()),
        "metadata": free(),
        "parallel_tool_calls": boolean(),
        "previous_response_id": nothing("None is kept."),
        "reasoning": free(),
        "store": {"const": False},
        "temperature": number(),
        "text": free(),
        "tool_choice": either(text(), free()),
        "tools": array(free()),
        "top_p": number(),
        "truncation": words("disabled"),
    }
    return given(
        {
            "id": text(),
            "object": words("response"),
            "created_at": integer(),
            "status": words("in_progress", "completed", "incomplete", "failed"),
            "background": {"const": False},
            "error": nullable(given({"code": text(), "message": text()})),
            "incomplete_details": nullable(given({"reason": words("max_output_tokens")})),
            "model": text(),
            "output": array(ref("ResponseOutputItem")),
            **echo,
            "usage": nullable(ref("ResponseUsage")),
        }
    )


def _output_item() -> Schema:
    shared = {"id": text(), "status": words("in_progress", "completed", "incomplete")}
    said = given({"type": words("output_text"), "text": text(), "annotations": array({}), "logprobs": array({})})
    thought = given({"type": words("reasoning_text"), "text": text()})
    return either(
        given({"type": words("message"), "role": words("assistant"), "content": array(said), **shared}),
        given({"type": words("reasoning"), "summary": array({}), "content": array(thought), **shared}),
        given({"type": words("function_call"), "call_id": text(), "name": text(), "arguments": text(), **shared}),
    )


def _usage() -> Schema:
    return given(
        {
            "input_tokens": integer(),
            "input_tokens_details": given({"cached_tokens": integer()}),
            "output_tokens": integer(),
            "output_tokens_details": given({"reasoning_tokens": integer()}),
            "total_tokens": integer(),
        }
    )


def _event() -> Schema:
    """One event of a stream; what it holds beside depends on its type."""
    place: dict[str, Schema] = {"item_id": text(), "output_index": integer(), "content_index": integer()}
    held: dict[str, Schema] = {
        "response": ref("Response"),
        "item": ref("ResponseOutputItem"),
        "part": free(),
        "delta": text(),
        "text": text(),
        "arguments": text(),
        "name": text(),
        "logprobs": array({}),
    }
    return given({"type": text(), "sequence_number": integer()}, {**place, **held}, "The data of one event of the stream.")
