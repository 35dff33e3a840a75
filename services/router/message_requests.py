"""Anthropic's requests: the bodies of /v1/messages and its count_tokens, checked field by field. Knows no tokenizer and no HTTP.

As openai.py: every refusal is a RequestError naming the field. `thinking` that a client does not ask for is off, as the API has it, where
the model's template can turn it off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from duomo.errors import RequestError
from services.router.chat_messages import text_of
from services.router.common_fields import CommonNames, CommonReader, constrained, json_object
from services.router.conversation import ChatMessage, Conversation, FunctionTool, ToolCall, ToolUse
from services.router.fields import Fields, wrong_type
from services.router.openai import ChatRequest
from services.router.structured import Structure, schema_structure
from services.router.tools import check_names, function_tool, tool_use_of

_NAMES: Final = CommonNames(
    lengths=("max_tokens",), stop="stop_sequences", ignored=("metadata", "service_tier", "cache_control"), has_choices=False
)
_CHOICES: Final = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}
_MIN_THINKING_TOKENS: Final = 1024  # Anthropic's own floor of budget_tokens


@dataclass(frozen=True, slots=True)
class MessageRequest:
    """wants_thinking: the client turned it on, so that a model without reasoning has to refuse."""

    chat: ChatRequest
    wants_thinking: bool


class MessageParser:
    """Turns bodies into chats for the reader's model."""

    def __init__(self, reader: CommonReader) -> None:
        self._reader = reader

    def message(self, body: bytes) -> MessageRequest:
        fields = Fields(json_object(body))
        self._reader.check_model(fields)
        if not fields.has("max_tokens"):
            raise RequestError("You must provide 'max_tokens'.", param="max_tokens", code="missing_required_parameter")
        conversation, wants_thinking = _conversation(fields)
        structure = _output_format(fields)
        common = constrained(self._reader.read(fields, _NAMES, None), structure)
        return MessageRequest(ChatRequest(conversation, common), wants_thinking)

    def count(self, body: bytes) -> Conversation:
        """What count_tokens counts."""
        fields = Fields(json_object(body))
        self._reader.check_model(fields)
        conversation, _ = _conversation(fields)
        fields.finish()
        return conversation


def _conversation(fields: Fields) -> tuple[Conversation, bool]:
    system = fields.take("system")
    turns = [ChatMessage("system", text_of("system", _uncached("system", system)))] if system not in (None, "", []) else []
    values = fields.array("messages")
    if not values:
        raise RequestError("You must provide 'messages', at least one.", param="messages", code="missing_required_parameter")
    for idx, value in enumerate(values):
        turns += _turns(f"messages[{idx}]", value)
    if turns[-1].role == "assistant":
        where = f"messages[{len(values) - 1}].role"
        detail = f"'{where}': the last turn must be the user's; going on with an assistant's is not supported."
        raise RequestError(detail, param=where, code="unsupported_parameter")
    tool_use = _tool_use(fields)
    wants_thinking = _thinking(fields)
    return Conversation(tuple(turns), tool_use, {"enable_thinking": wants_thinking}), wants_thinking


def _turns(name: str, value: object) -> list[ChatMessage]:
    """A user's message is one turn of role "tool" for each result in it, and the user's own for its text, in their order."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    role, content = fields.string("role"), fields.take("content")
    fields.finish()
    if role not in ("user", "assistant"):
        raise RequestError(f"'{name}.role' must be user or assistant.", param=f"{name}.role")
    if not isinstance(content, list):
        return [ChatMessage(role, text_of(f"{name}.content", content))]
    if not content:
        raise RequestError(f"'{name}.content' must not be empty.", param=f"{name}.content")
    blocks = [_Block(f"{name}.content[{idx}]", block) for idx, block in enumerate(content)]
    return [_assistant_turn(blocks)] if role == "assistant" else _user_turns(blocks)


class _Block:
    """One content block: its type and its other fields."""

    def __init__(self, name: str, value: object) -> None:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        self.name = name
        self.fields = Fields(value, name + ".")
        self.kind = self.fields.string("type")
        if self.kind is None:
            raise RequestError(f"You must provide '{name}.type'.", param=f"{name}.type", code="missing_required_parameter")
        self.fields.ignore("cache_control")

    def text(self, field: str = "text") -> str:
        """What stands in this field; nothing else may stand in the block."""
        text = self.required(field)
        self.fields.ignore("citations")
        self.fields.finish()
        return text

    def required(self, field: str) -> str:
        value = self.fields.string(field)
        if value is None:
            where = self.fields.name(field)
            raise RequestError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
        return value

    def refused(self) -> RequestError:
        detail = f"'{self.name}' is of type '{self.kind}'; this model reads only text, tool calls and their results."
        return RequestError(detail, param=self.name, code="unsupported_content")


def _user_turns(blocks: list[_Block]) -> list[ChatMessage]:
    turns: list[ChatMessage] = []
    texts: list[str] = []
    for block in blocks:
        if block.kind == "text":
            texts.append(block.text())
        elif block.kind == "tool_result":
            if texts:
                turns.append(ChatMessage("user", "".join(texts)))
                texts = []
            turns.append(_result(block))
        else:
            raise block.refused()
    return [*turns, ChatMessage("user", "".join(texts))] if texts else turns


def _result(block: _Block) -> ChatMessage:
    """A failed call without words of its own is told as "error"."""
    call_id = block.required("tool_use_id")
    content = block.fields.take("content")
    is_error = block.fields.boolean("is_error")
    block.fields.finish()
    where = f"{block.name}.content"
    told = text_of(where, _uncached(where, content)) if content not in (None, "", []) else ""
    return ChatMessage("tool", told or ("error" if is_error else ""), tool_call_id=call_id)


def _assistant_turn(blocks: list[_Block]) -> ChatMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for block in blocks:
        if block.kind == "text":
            texts.append(block.text())
        elif block.kind == "thinking":
            block.fields.ignore("signature")
            thoughts.append(block.text("thinking"))
        elif block.kind == "tool_use":
            call_id, name = block.required("id"), block.required("name")
            arguments = block.fields.mapping("input") or {}
            block.fields.finish()
            calls.append(ToolCall(call_id, name, msgspec.json.encode(arguments).decode()))
        else:
            raise block.refused()
    return ChatMessage("assistant", "".join(texts), None, tuple(calls), None, "".join(thoughts) or None)


def _tool_use(fields: Fields) -> ToolUse:
    values = fields.array("tools") or []
    tools = tuple(_tool(f"tools[{idx}]", value) for idx, value in enumerate(values))
    check_names([tool.name for tool in tools], lambda idx: f"tools[{idx}].name")
    raw = fields.mapping("tool_choice")
    if raw is None:
        return ToolUse(tools)
    choice = Fields(raw, "tool_choice.")
    kind = choice.string("type")
    if kind not in _CHOICES:
        raise RequestError(f"'tool_choice.type' must be one of {', '.join(_CHOICES)}.", param="tool_choice.type")
    named = choice.string("name") if kind == "tool" else None
    if kind == "tool" and named is None:
        raise RequestError("You must provide 'tool_choice.name'.", param="tool_choice.name", code="missing_required_parameter")
    is_parallel = not choice.boolean("disable_parallel_tool_use")
    choice.finish()
    return tool_use_of(tools, _CHOICES[kind], named, is_parallel)


def _tool(name: str, value: object) -> FunctionTool:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    kind = fields.string("type")
    if kind not in (None, "custom"):
        detail = f"'{name}.type' is '{kind}'; this server has no tools of its own, only functions of the client's ('custom')."
        raise RequestError(detail, param=f"{name}.type", code="unsupported_parameter")
    if not fields.has("input_schema"):
        where = f"{name}.input_schema"
        raise RequestError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
    tool = function_tool(fields, "input_schema")
    fields.boolean("strict")
    fields.ignore("cache_control")
    fields.finish()
    return tool


def _thinking(fields: Fields) -> bool:
    """Whether it is on. budget_tokens is checked and not enforced: a model thinks as long as it thinks, up to max_tokens."""
    raw = fields.mapping("thinking")
    if raw is None:
        return False
    thinking = Fields(raw, "thinking.")
    kind = thinking.string("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise RequestError("'thinking.type' must be enabled, adaptive or disabled.", param="thinking.type")
    if kind == "enabled":
        thinking.integer("budget_tokens", low=_MIN_THINKING_TOKENS, high=1 << 31)
    thinking.finish()
    return kind != "disabled"


def _output_format(fields: Fields) -> Structure | None:
    """Of output_config, where `effort` may only be what the API has by default."""
    config = Fields(fields.mapping("output_config") or {}, "output_config.")
    config.refuse_unless({"effort": ("high",)})
    raw = config.mapping("format")
    config.finish()
    if raw is None:
        return None
    form = Fields(raw, "output_config.format.")
    if form.string("type") != "json_schema":
        raise RequestError("'output_config.format.type' must be json_schema.", param="output_config.format.type")
    return schema_structure(form)


def _uncached(name: str, value: object) -> object:
    """Text blocks without what says where Anthropic would cache."""
    if not isinstance(value, list):
        return value
    for idx, block in enumerate(value):
        if not isinstance(block, dict):
            raise wrong_type(f"{name}[{idx}]", "an object", block)
    return [{key: inner for key, inner in block.items() if key not in ("cache_control", "citations")} for block in value]
