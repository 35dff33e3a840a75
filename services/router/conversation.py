"""PURE: a conversation as every chat endpoint reads it: turns, tool calls and their results, reasoning. Knows no body and no template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant called. arguments: JSON text, as the model wrote it or the client sent it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """A function that the assistant may call. parameters: its JSON schema, None where it takes none; field: where the body has it."""

    name: str
    description: str | None = None
    parameters: Mapping[str, object] | None = None
    field: str = "tools"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which functions, and whether one must be called: `named` is the one that must, where choice is "named"."""

    tools: tuple[FunctionTool, ...] = ()
    choice: Literal["auto", "none", "required", "named"] = "auto"
    named: str | None = None
    is_parallel: bool = True

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.choice != "none"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn, content flattened to text. tool_call_id: which call a turn of role "tool" answers."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders. template_kwargs: further names for it, as enable_thinking."""

    messages: tuple[ChatMessage, ...]
    tool_use: ToolUse = ToolUse()
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
