"""OpenAI's responses: the body of /v1/responses, checked field by field, as a conversation. Knows no tokenizer and no HTTP.

This server keeps no responses: what would need an earlier one, or one kept, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from duomo.errors import RequestError
from services.router.chat_messages import checked_arguments, text_of
from services.router.common_fields import CommonNames, CommonReader, constrained, json_object
from services.router.conversation import ChatMessage, Conversation, FunctionTool, ToolCall, ToolUse
from services.router.fields import Fields, wrong_type
from services.router.openai import ChatRequest
from services.router.structured import Structure, json_schema, schema_structure
from services.router.tools import check_names, function_tool, tool_use_of

_IGNORED: Final = (
    "user",
    "service_tier",
    "safety_identifier",
    "prompt_cache_retention",
    "prompt_cache_options",
    "max_tool_calls",  # of OpenAI's own tools, which are refused
)
_NAMES: Final = CommonNames(lengths=("max_output_tokens",), ignored=_IGNORED, has_choices=False)
_OFF: Final[dict[str, tuple[object, ...]]] = {
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "store": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_ROLES: Final = ("user", "assistant", "system", "developer")


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """echo: what the answer repeats of the request."""

    chat: ChatRequest
    echo: Mapping[str, object]


class ResponseParser:
    """Turns bodies into chats for the reader's model."""

    def __init__(self, reader: CommonReader) -> None:
        self._reader = reader

    def response(self, body: bytes) -> ResponseRequest:
        raw = json_object(body)
        fields = Fields(raw)
        self._reader.check_model(fields)
        turns = _instructions(fields) + _input(fields.take("input"))
        tool_use = _tool_use(fields)
        fields.refuse_unless(_OFF)
        _check_include(fields)
        structure = _text_format(fields)
        metadata = fields.mapping("metadata")
        kwargs = (fields.mapping("chat_template_kwargs") or {}) | _reasoning(fields)
        common = constrained(self._reader.read(fields, _NAMES, None), structure)
        echo = {
            "instructions": raw.get("instructions"),
            "max_output_tokens": common.max_tokens,
            "metadata": metadata or {},
            "parallel_tool_calls": tool_use.is_parallel,
            "previous_response_id": None,
            "reasoning": raw.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "temperature": common.sampling.temperature,
            "text": raw.get("text") or {"format": {"type": "text"}},
            "tool_choice": raw.get("tool_choice") or "auto",
            "tools": raw.get("tools") or [],
            "top_p": common.sampling.top_p,
            "truncation": "disabled",
        }
        return ResponseRequest(ChatRequest(Conversation(tuple(turns), tool_use, kwargs), common, prompt_field="input"), echo)


def _instructions(fields: Fields) -> list[ChatMessage]:
    told = fields.string("instructions")
    return [ChatMessage("system", told)] if told else []


def _input(value: object) -> list[ChatMessage]:
    if isinstance(value, str):
        return [ChatMessage("user", value)]
    if value is None:
        raise RequestError("You must provide an 'input'.", param="input", code="missing_required_parameter")
    if not isinstance(value, list):
        raise wrong_type("input", "a string or an array of items", value)
    if not value:
        raise RequestError("'input' must not be empty.", param="input")
    turns = _Turns()
    for idx, item in enumerate(value):
        _take_item(f"input[{idx}]", item, turns)
    return turns.finish()


class _Turns:
    """Items put together to turns: what the assistant thought, said and called in a row is one turn of its."""

    def __init__(self) -> None:
        self._turns: list[ChatMessage] = []
        self._reasoning = ""
        self._text = ""
        self._calls: list[ToolCall] = []

    def other(self, turn: ChatMessage) -> None:
        self._flush()
        self._turns.append(turn)

    def thought(self, text: str) -> None:
        if self._text or self._calls:
            self._flush()
        self._reasoning += text

    def said(self, text: str) -> None:
        if self._calls:
            self._flush()
        self._text += text

    def called(self, call: ToolCall) -> None:
        self._calls.append(call)

    def finish(self) -> list[ChatMessage]:
        self._flush()
        return self._turns

    def _flush(self) -> None:
        if self._reasoning or self._text or self._calls:
            turn = ChatMessage("assistant", self._text, None, tuple(self._calls), None, self._reasoning or None)
            self._turns.append(turn)
            self._reasoning, self._text, self._calls = "", "", []


def _take_item(name: str, value: object, turns: _Turns) -> None:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    told = fields.string("type")
    kind = "message" if told is None else told
    fields.ignore("id", "status", "phase")
    if kind == "message":
        role = fields.string("role")
        if role not in _ROLES:
            raise RequestError(f"'{name}.role' must be one of {', '.join(_ROLES)}.", param=f"{name}.role")
        text = _text(f"{name}.content", fields.take("content"))
        if role == "assistant":
            turns.said(text)
        else:
            turns.other(ChatMessage(role, text))
    elif kind == "function_call":
        call_id, called = _required(fields, "call_id"), _required(fields, "name")
        turns.called(ToolCall(call_id, called, checked_arguments(f"{name}.arguments", fields.string("arguments"))))
    elif kind == "function_call_output":
        call_id = _required(fields, "call_id")
        turns.other(ChatMessage("tool", _text(f"{name}.output", fields.take("output")), tool_call_id=call_id))
    elif kind == "reasoning":
        fields.ignore("summary", "encrypted_content")
        content = fields.take("content")
        turns.thought(_text(f"{name}.content", content) if content not in (None, []) else "")
    else:
        detail = f"'{name}.type' is '{kind}'; this server takes message, function_call, function_call_output and reasoning."
        raise RequestError(detail, param=f"{name}.type", code="unsupported_content")
    fields.finish()


def _text(name: str, value: object) -> str:
    """Of a string or of parts, each under the name that it has in its item."""
    if not isinstance(value, list):
        return "" if value == "" else text_of(name, value)
    parts = []
    for idx, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("output_text", "reasoning_text"):
            part = {"type": "text", **{key: inner for key, inner in part.items() if key not in ("type", "annotations", "logprobs")}}
        elif kind not in ("input_text", "text") and isinstance(part, dict):
            where = f"{name}[{idx}]"
            raise RequestError(f"'{where}' is of type '{kind}'; this model reads only text.", param=where, code="unsupported_content")
        parts.append(part)
    return text_of(name, parts)


def _required(fields: Fields, field: str) -> str:
    value = fields.string(field)
    if value is None:
        where = fields.name(field)
        raise RequestError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
    return value


def _tool_use(fields: Fields) -> ToolUse:
    values = fields.array("tools") or []
    tools = tuple(_tool(f"tools[{idx}]", value) for idx, value in enumerate(values))
    check_names([tool.name for tool in tools], lambda idx: f"tools[{idx}].name")
    choice = fields.take("tool_choice")
    named = None
    if isinstance(choice, dict):
        chosen = Fields(choice, "tool_choice.")
        if chosen.string("type") != "function":
            raise RequestError("'tool_choice.type' must be 'function'.", param="tool_choice.type", code="unsupported_parameter")
        named = _required(chosen, "name")
        chosen.finish()
    is_parallel = fields.boolean("parallel_tool_calls", default=True)
    return tool_use_of(tools, "named" if named is not None else choice, named, is_parallel)


def _tool(name: str, value: object) -> FunctionTool:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    kind = fields.string("type")
    if kind != "function":
        detail = f"'{name}.type' is '{kind}'; this server has no tools of its own, only functions of the client's ('function')."
        raise RequestError(detail, param=f"{name}.type", code="unsupported_parameter")
    tool = function_tool(fields, "parameters")
    fields.boolean("strict")
    fields.finish()
    return tool


def _check_include(fields: Fields) -> None:
    """Encrypted reasoning is what a client without stored responses asks for: here reasoning is in the open, in the item's content."""
    for idx, value in enumerate(fields.array("include") or []):
        if value != "reasoning.encrypted_content":
            where = f"include[{idx}]"
            raise RequestError(f"'{where}' is not supported with this value.", param=where, code="unsupported_parameter")


def _text_format(fields: Fields) -> Structure | None:
    text = Fields(fields.mapping("text") or {}, "text.")
    text.refuse_unless({"verbosity": ("medium",)})
    raw = text.mapping("format")
    text.finish()
    form = Fields({"type": "text"} if raw is None else raw, "text.format.")
    kind = form.string("type")
    if kind == "json_schema":
        form.ignore("name", "description", "strict")  # every schema is kept strictly
        return schema_structure(form)
    form.finish()
    if kind == "json_object":
        return Structure(json_schema({"type": "object"}), "text.format")
    if kind != "text":
        raise RequestError(f"'text.format.type' must be text, json_object or json_schema, got '{kind}'.", param="text.format.type")
    return None


def _reasoning(fields: Fields) -> dict[str, object]:
    """As the template knows it: effort "none" turns thinking off, "medium" (the API's default) leaves it as it is."""
    reasoning = Fields(fields.mapping("reasoning") or {}, "reasoning.")
    reasoning.ignore("summary", "generate_summary")  # reasoning is shown whole
    effort = reasoning.string("effort")
    reasoning.finish()
    if effort not in (None, "none", "medium"):
        detail = f"'reasoning.effort' must be none or medium, got '{effort}': how long a model thinks cannot be chosen here."
        raise RequestError(detail, param="reasoning.effort", code="unsupported_parameter")
    return {"enable_thinking": False} if effort == "none" else {}
