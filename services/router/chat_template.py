"""A model's chat template: what it has a place for, how its output is marked, and the rendering of a conversation. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError, ModelError, RequestError
from services.router.conversation import ChatMessage, Conversation, FunctionTool
from services.router.markup import CALL, END_THINK, THINK, OutputStyle, ToolFormat

_OWN_NAMES: Final = ("messages", "tools", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Rendered:
    """The prompt's text, and how what the model says to it is marked."""

    text: str
    style: OutputStyle


class ChatTemplate:
    """One source, or one and another for conversations with tools (as Hermes 2 has it). special: bos_token and the like, by name.

    options: gateway.tool_parser and gateway.reasoning_parser; "auto" goes by what the source writes itself.
    """

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str], options: GatewaySection | None = None) -> None:
        environment = _environment()
        self._special = special
        self._default = environment.from_string(sources["default"])
        self._for_tools = environment.from_string(sources.get("tool_use", sources["default"]))
        source = "".join(sources.values())
        self._names = frozenset[str]().union(*(jinja2.meta.find_undeclared_variables(environment.parse(one)) for one in sources.values()))
        self._tool_parser: Literal["auto", "hermes", "none"] = options.tool_parser if options is not None else "auto"
        # Qwen3-Coder writes <function=...> between the same marks: not this form.
        self._is_hermes = self._tool_parser == "hermes" or (self._tool_parser == "auto" and CALL in source and "<function=" not in source)
        reasoning = options.reasoning_parser if options is not None else "auto"
        self._marks_reasoning = reasoning == "think" or (reasoning == "auto" and END_THINK in source)
        self._knows_developer = "developer" in source

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> Rendered:
        """The conversation as the model was trained to read it. RequestError naming `tools`, `messages` or `chat_template_kwargs`."""
        tool_use = conversation.tool_use
        tool_format = self._tool_format() if tool_use.may_call else None
        self._check_kwargs(conversation.template_kwargs)
        self._check_tool_turns(conversation.messages)
        template = self._for_tools if tool_use.may_call else self._default
        try:
            text = template.render(
                **{
                    **self._special,
                    **conversation.template_kwargs,
                    "messages": self._turns(conversation.messages),
                    "tools": [_shown(tool) for tool in tool_use.tools] if tool_use.may_call else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"The model's chat template refuses these messages: {error}.", param="messages") from error
        return Rendered(text, OutputStyle(tool_format, self._reasoning(text), tool_use.is_parallel))

    def _tool_format(self) -> ToolFormat:
        """Raises RequestError where the model can neither be told of tools nor be understood when it calls one."""
        if "tools" not in self._names:
            why = "this model's chat template has no place for tools; the operator can give another (gateway.chat_template)"
        elif self._tool_parser == "none":
            why = "tool calls are turned off here (gateway.tool_parser)"
        elif not self._is_hermes:
            why = "how this model's template writes tool calls is not known here (gateway.tool_parser: hermes)"
        else:
            return "hermes"
        raise RequestError(f"'tools' cannot be used: {why}.", param="tools", code="unsupported_parameter")

    def _check_tool_turns(self, messages: tuple[ChatMessage, ...]) -> None:
        if "tools" in self._names:
            return
        for idx, message in enumerate(messages):
            if message.tool_calls or message.role == "tool":
                name = f"messages[{idx}]." + ("tool_calls" if message.tool_calls else "role")
                detail = f"'{name}': this model's chat template has no place for tool calls and their results."
                raise RequestError(detail, param=name, code="unsupported_parameter")

    def _check_kwargs(self, kwargs: Mapping[str, object]) -> None:
        for name in kwargs:
            if name in _OWN_NAMES or name in self._special:
                raise RequestError(f"'chat_template_kwargs.{name}' is not the client's to set.", param=f"chat_template_kwargs.{name}")

    def _reasoning(self, rendered: str) -> Literal["none", "outside", "inside"]:
        """A prompt that ends behind the closing mark has told the model not to think."""
        told = rendered.rstrip()
        if not self._marks_reasoning or told.endswith(END_THINK):
            return "none"
        return "inside" if told.endswith(THINK) else "outside"

    def _turns(self, messages: tuple[ChatMessage, ...]) -> list[dict[str, object]]:
        """A result without a name has its call's: some templates (Hermes') print it, and no client sends it."""
        called = {call.call_id: call.name for message in messages for call in message.tool_calls}
        turns = []
        for message in messages:
            turn = self._turn(message)
            if message.tool_call_id in called:
                turn.setdefault("name", called[message.tool_call_id])
            turns.append(turn)
        return turns

    def _turn(self, message: ChatMessage) -> dict[str, object]:
        role = "system" if message.role == "developer" and not self._knows_developer else message.role
        turn: dict[str, object] = {"role": role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.reasoning is not None:
            turn["reasoning_content"] = message.reasoning
        if message.tool_calls:
            turn["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in message.tool_calls
            ]
        return turn


def template_of(
    folder: Path, settings: Mapping[str, object], special: Mapping[str, str], options: GatewaySection | None
) -> ChatTemplate | None:
    """The one that gateway.chat_template names, or the model folder's; None where there is none. Raises ConfigError or ModelError
    for what cannot be read or is no template."""
    named = options.chat_template if options is not None else None
    sources = {"default": _read(named)} if named is not None else _sources(folder, settings)
    if not sources:
        return None
    try:
        return ChatTemplate(sources, special, options)
    except jinja2.TemplateError as error:
        if named is not None:
            raise ConfigError(f"gateway.chat_template {named} is no Jinja template: {error}", code="bad_template") from error
        raise ModelError(f"the chat template in {folder} is no Jinja template: {error}") from error


def _sources(folder: Path, settings: Mapping[str, object]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    if isinstance(source, list):
        named = {str(entry.get("name")): str(entry.get("template")) for entry in source if isinstance(entry, dict)}
        return named if "default" in named else {}
    sources = {"default": source} if isinstance(source, str) else {}
    beside = folder / "additional_chat_templates" / "tool_use.jinja"
    return sources | ({"tool_use": beside.read_text(encoding="utf-8")} if sources and beside.exists() else {})


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"gateway.chat_template {file} cannot be read: {error}", code="bad_template") from error


def _shown(tool: FunctionTool) -> dict[str, object]:
    """As OpenAI's clients send it, which is what templates print."""
    function: dict[str, object] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": function}


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The settings and names that published templates are written for (those of transformers)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
