"""PURE: what a chat's output consists of once its markup is read: reasoning, text, tool calls. Knows no markup and no endpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """More of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class TextPart:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A tool call begins; index counts the choice's calls from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: JSON text."""

    index: int
    text: str


OutputPart = ReasoningPart | TextPart | CallOpened | CallArguments


@dataclass(slots=True)
class ReasoningBlock:
    text: str


@dataclass(slots=True)
class TextBlock:
    text: str


@dataclass(slots=True)
class CallBlock:
    call_id: str
    name: str
    arguments: str


OutputBlock = ReasoningBlock | TextBlock | CallBlock


def blocks_of(parts: Iterable[OutputPart]) -> list[OutputBlock]:
    """The parts put together, in order: neighbours of one kind are one block."""
    blocks: list[OutputBlock] = []
    for part in parts:
        last = blocks[-1] if blocks else None
        if isinstance(part, CallOpened):
            blocks.append(CallBlock(part.call_id, part.name, ""))
        elif isinstance(part, CallArguments):
            assert isinstance(last, CallBlock), "arguments follow their call's opening"
            last.arguments += part.text
        elif isinstance(part, TextPart):
            if isinstance(last, TextBlock):
                last.text += part.text
            else:
                blocks.append(TextBlock(part.text))
        elif isinstance(last, ReasoningBlock):
            last.text += part.text
        else:
            blocks.append(ReasoningBlock(part.text))
    return blocks
