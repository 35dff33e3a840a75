"""OpenAI's `messages`, turn by turn, into a conversation's. Knows no tokenizer and no other field."""

from __future__ import annotations

from typing import Final

import msgspec

from duomo.errors import RequestError
from services.router.conversation import ChatMessage, ToolCall
from services.router.fields import Fields, kind_of, wrong_type

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_OFF: Final[dict[str, tuple[object, ...]]] = {
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}


def read_messages(values: list[object] | None) -> tuple[ChatMessage, ...]:
    if values is None:
        raise RequestError("You must provide 'messages'.", param="messages", code="missing_required_parameter")
    if not values:
        raise RequestError("'messages' must hold at least one message.", param="messages")
    return tuple(_message(f"messages[{idx}]", value) for idx, value in enumerate(values))


def _message(name: str, value: object) -> ChatMessage:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    role = fields.string("role")
    if role is None:
        raise RequestError(f"You must provide '{name}.role'.", param=f"{name}.role", code="missing_required_parameter")
    if role not in _ROLES:
        raise RequestError(f"'{name}.role' must be one of {', '.join(_ROLES)}.", param=f"{name}.role")
    tool_calls = _tool_calls(fields, role)
    content = fields.take("content")
    speaker = fields.string("name")
    reasoning = _reasoning(fields, role)
    # As an answer says that it has no text: beside calls or reasoning, or as null.
    has_none = content is None and role == "assistant" and (bool(tool_calls) or reasoning is not None or "content" in value)
    told = "" if has_none else text_of(f"{name}.content", content)
    tool_call_id = _tool_call_id(fields, role)
    fields.refuse_unless(_MESSAGE_OFF)
    fields.finish()
    return ChatMessage(role, told, speaker, tool_calls, tool_call_id, reasoning)


def _tool_calls(fields: Fields, role: str) -> tuple[ToolCall, ...]:
    values = fields.array("tool_calls") or []
    where = fields.name("tool_calls")
    if values and role != "assistant":
        raise RequestError(f"'{where}' is only the assistant's.", param=where)
    return tuple(_tool_call(f"{where}[{idx}]", value) for idx, value in enumerate(values))


def _tool_call(name: str, value: object) -> ToolCall:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    call_id = fields.string("id") or ""
    kind = fields.string("type")
    if kind not in (None, "function"):
        raise RequestError(f"'{name}.type' must be 'function', got '{kind}'.", param=f"{name}.type")
    function = Fields(fields.mapping("function") or {}, f"{name}.function.")
    called = function.string("name")
    if called is None:
        where = f"{name}.function.name"
        raise RequestError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
    arguments = checked_arguments(f"{name}.function.arguments", function.string("arguments"))
    function.finish()
    fields.ignore("index")  # of a streamed delta, sent back as it came
    fields.finish()
    return ToolCall(call_id, called, arguments)


def checked_arguments(name: str, arguments: str | None) -> str:
    """A call's arguments as a JSON object's text: what templates print has to be one."""
    if not (arguments or "").strip():
        return "{}"
    try:
        value: object = msgspec.json.decode(arguments or "")
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"'{name}' is not valid JSON: {error}.", param=name) from error
    if not isinstance(value, dict):
        raise RequestError(f"'{name}' must hold a JSON object, got {kind_of(value)}.", param=name)
    return arguments or "{}"


def _reasoning(fields: Fields, role: str) -> str | None:
    """Under both names that servers give it."""
    older, newer = fields.string("reasoning_content"), fields.string("reasoning")
    told = newer if newer is not None else older
    if told is not None and role != "assistant":
        where = fields.name("reasoning" if newer is not None else "reasoning_content")
        raise RequestError(f"'{where}' is only the assistant's.", param=where)
    return told


def _tool_call_id(fields: Fields, role: str) -> str | None:
    call_id = fields.string("tool_call_id")
    where = fields.name("tool_call_id")
    if role == "tool" and call_id is None:
        raise RequestError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
    if role != "tool" and call_id is not None:
        raise RequestError(f"'{where}' is only a tool's.", param=where)
    return call_id


def text_of(name: str, value: object) -> str:
    """Of a string or of an array of text parts; anything but text is refused by its place."""
    if value is None:
        raise RequestError(f"You must provide '{name}'.", param=name, code="missing_required_parameter")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of content parts", value)
    if not value:
        raise RequestError(f"'{name}' must not be empty.", param=name)
    return "".join(_part(f"{name}[{idx}]", part) for idx, part in enumerate(value))


def _part(name: str, value: object) -> str:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    kind = fields.string("type")
    if kind is None:
        raise RequestError(f"You must provide '{name}.type'.", param=f"{name}.type", code="missing_required_parameter")
    if kind not in ("text", "input_text"):
        raise RequestError(f"'{name}' is of type '{kind}'; this model reads only text.", param=name, code="unsupported_content")
    text = fields.string("text")
    if text is None:
        raise RequestError(f"You must provide '{name}.text'.", param=f"{name}.text", code="missing_required_parameter")
    fields.finish()
    return text
