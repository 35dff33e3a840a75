"""OpenAI's `messages`, turn by turn, into a conversation's. Knows no tokenizer and no other field."""

from __future__ import annotations

from typing import Final

from duomo.errors import RequestError
from services.router.conversation import ChatMessage
from services.router.fields import Fields, wrong_type

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_OFF: Final[dict[str, tuple[object, ...]]] = {
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
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
    content = _content(f"{name}.content", fields.take("content"))
    speaker = fields.string("name")
    fields.refuse_unless(_MESSAGE_OFF)
    fields.finish()
    return ChatMessage(role, content, speaker)


def _content(name: str, value: object) -> str:
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
