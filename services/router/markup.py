"""PURE: reads the markup of a growing chat output, whatever pieces it comes in. Knows no endpoint and no template.

    reasoning    <think> ... </think> in front of the answer, or, where the prompt opened it, an output that starts inside
    tool calls   Hermes' form, which Qwen and others use: <tool_call> {"name": ..., "arguments": {...}} </tool_call>

The parts do not depend on how the output is cut into pieces. Line breaks and spaces between markup and text belong to the markup. A call
whose name stands before its arguments (as models are trained to write it) is passed on while it grows; another, or one that takes more than
_MAX_HEAD_CHARS to come to its arguments, once it is complete. What looks like a call and is none (broken JSON, no name) stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Final, Literal

from services.router.output_parts import CallArguments, CallOpened, OutputPart, ReasoningPart, TextPart

THINK: Final = "<think>"
END_THINK: Final = "</think>"
CALL: Final = "<tool_call>"
END_CALL: Final = "</tool_call>"
MARKERS: Final = (THINK, END_THINK, CALL, END_CALL)

# Of a call whose arguments can be passed on as they come: everything before them.
_CALL_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MAX_HEAD_CHARS: Final = 1024  # which holds every name: looked at anew with each piece, so it is bounded
_STRUCTURAL: Final = re.compile(r'["\\{}\[\]]')
_SPACE: Final = " \t\r\n"

ToolFormat = Literal["hermes"]


@dataclass(frozen=True, slots=True)
class OutputStyle:
    """How one chat's output is to be read. reasoning: not at all, where it opens itself, or from the start. id_bytes: of a call's id."""

    tool_format: ToolFormat | None = None
    reasoning: Literal["none", "outside", "inside"] = "none"
    is_parallel: bool = True

    @property
    def has_markup(self) -> bool:
        return self.tool_format is not None or self.reasoning != "none"


class OutputReader:
    """Turns one choice's text into parts. finish() is called once, when nothing follows."""

    def __init__(self, style: OutputStyle, id_prefix: str = "call_") -> None:
        self._think = _ThinkReader(is_inside=style.reasoning == "inside") if style.reasoning != "none" else None
        self._calls = _CallReader(id_prefix, is_parallel=style.is_parallel) if style.tool_format is not None else None

    @property
    def has_called(self) -> bool:
        return self._calls is not None and self._calls.num_calls > 0

    @property
    def is_reasoning(self) -> bool:
        return self._think is not None and self._think.is_inside

    def push(self, text: str) -> list[OutputPart]:
        if self._think is None:
            return self._answer(text)
        reasoning, answer = self._think.push(text)
        return _reasoned(reasoning) + self._answer(answer)

    def finish(self) -> list[OutputPart]:
        parts: list[OutputPart] = []
        if self._think is not None:
            reasoning, answer = self._think.finish()
            parts = _reasoned(reasoning) + self._answer(answer)
        return parts + (self._calls.finish() if self._calls is not None else [])

    def _answer(self, text: str) -> list[OutputPart]:
        if self._calls is not None:
            return self._calls.push(text) if text else []
        return [TextPart(text)] if text else []


class _ThinkReader:
    """Splits what is thought from what is said: (reasoning, answer) of each piece."""

    def __init__(self, *, is_inside: bool) -> None:
        self._state: Literal["before", "inside", "gap", "after"] = "inside" if is_inside else "before"
        self._held = ""
        self._has_thought = False  # the first character of the reasoning is out: line breaks before it are none of it

    @property
    def is_inside(self) -> bool:
        return self._state == "inside"

    def push(self, text: str) -> tuple[str, str]:
        if self._state == "after":
            return "", text
        self._held += text
        if self._state == "before":
            start = self._held.lstrip(_SPACE)
            if THINK.startswith(start):
                if start != THINK:
                    return "", ""
            elif not start.startswith(THINK):
                self._state, answer, self._held = "after", self._held, ""
                return "", answer
            self._state, self._held = "inside", start.removeprefix(THINK)
        reasoning = self._think() if self._state == "inside" else ""
        return reasoning, self._leave_gap() if self._state == "gap" else ""

    def finish(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held, "") if self._state == "inside" and held.strip(_SPACE) else ("", held if self._state == "before" else "")

    def _think(self) -> str:
        if not self._has_thought:
            self._held = self._held.lstrip(_SPACE)
        reasoning, found, rest = self._held.partition(END_THINK)
        if found:
            self._state, self._held = "gap", rest
            return reasoning.rstrip(_SPACE)
        keep = _tail_that_may_become(self._held, END_THINK)
        reasoning, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._has_thought = self._has_thought or bool(reasoning)
        return reasoning

    def _leave_gap(self) -> str:
        answer = self._held.lstrip(_SPACE)
        if answer:
            self._state, self._held = "after", ""
        return answer


class _CallReader:
    """Finds tool calls in an answer. is_parallel: whether calls after the first are passed on."""

    def __init__(self, id_prefix: str, *, is_parallel: bool) -> None:
        self.num_calls = 0
        self._id_prefix = id_prefix
        self._is_parallel = is_parallel
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._held = ""
        self._object = _ObjectEnd()
        self._num_scanned = 0
        self._gap = ""  # space in front of the opening mark: part of the text, if the mark is
        self._follows_call = False

    def push(self, text: str) -> list[OutputPart]:
        self._held += text
        parts: list[OutputPart] = []
        step = {"text": self._text, "head": self._head, "arguments": self._arguments, "tail": self._tail}
        while step[self._state](parts):
            pass
        return parts

    def finish(self) -> list[OutputPart]:
        parts: list[OutputPart] = []
        if self._state in ("text", "head"):
            self._say(self._held if self._state == "text" else self._gap + CALL + self._held, parts)
        self._held = ""
        return parts

    def _text(self, parts: list[OutputPart]) -> bool:
        """Each step says whether another can go on with what is held."""
        before, found, rest = self._held.partition(CALL)
        if found:
            said = before.rstrip(_SPACE)
            self._say(said, parts)
            self._begin_call(rest, gap=before[len(said) :])
            return True
        keep = _tail_that_may_become(before, CALL)
        self._say(before[: len(before) - keep], parts)
        self._held = before[len(before) - keep :]
        return False

    def _say(self, text: str, parts: list[OutputPart]) -> None:
        if self._follows_call:
            text = text.lstrip(_SPACE)
        if text:
            self._follows_call = False
            parts.append(TextPart(text))

    def _begin_call(self, rest: str, *, gap: str) -> None:
        self._state, self._held, self._gap, self._object, self._num_scanned = "head", rest, gap, _ObjectEnd(), 0

    def _head(self, parts: list[OutputPart]) -> bool:
        head = _CALL_HEAD.match(self._held, 0, _MAX_HEAD_CHARS) if self._num_scanned < _MAX_HEAD_CHARS else None
        name = _decoded(head[1]) if head else None
        if head is not None and isinstance(name, str):
            self._open(name, parts)
            self._state, self._held, self._object = "arguments", self._held[head.end() :], _ObjectEnd()
            return True
        start = len(self._held) - len(self._held.lstrip(_SPACE))
        if start == len(self._held):
            return False
        if self._held[start] != "{":
            return self._stays_text(parts)
        end = self._object.push(self._held, max(self._num_scanned, start))
        self._num_scanned = len(self._held)
        if end is None:
            return False
        call = _call_of(self._held[start:end])
        if call is None:
            return self._stays_text(parts)
        self._open(call[0], parts)
        self._argue(call[1], parts)
        self._state, self._held = "tail", self._held[end:]
        return True

    def _stays_text(self, parts: list[OutputPart]) -> bool:
        """The opening mark alone is passed on: whatever follows it is read anew."""
        self._say(self._gap + CALL, parts)
        self._state = "text"
        return True

    def _arguments(self, parts: list[OutputPart]) -> bool:
        end = self._object.push(self._held, 0)
        self._argue(self._held if end is None else self._held[:end], parts)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._state = "tail"
        return end is not None

    def _tail(self, parts: list[OutputPart]) -> bool:
        """After a call's arguments: nothing counts but its end, or the next call's start."""
        ends = [(at, mark) for mark in (END_CALL, CALL) if (at := self._held.find(mark)) >= 0]
        if not ends:
            self._held = self._held[-len(END_CALL) :]
            return False
        at, mark = min(ends)
        self._follows_call = True
        if mark == CALL:
            self._begin_call(self._held[at + len(mark) :], gap="")
        else:
            self._state, self._held = "text", self._held[at + len(mark) :]
        return True

    def _open(self, name: str, parts: list[OutputPart]) -> None:
        self.num_calls += 1
        if self._is_shown:
            parts.append(CallOpened(self.num_calls - 1, self._id_prefix + secrets.token_hex(12), name))

    def _argue(self, text: str, parts: list[OutputPart]) -> None:
        if self._is_shown and text:
            parts.append(CallArguments(self.num_calls - 1, text))

    @property
    def _is_shown(self) -> bool:
        return self._is_parallel or self.num_calls == 1


class _ObjectEnd:
    """Finds where a JSON object that comes in pieces ends; what it holds is not checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def push(self, text: str, start: int) -> int | None:
        """Index behind the object's last brace, reading on from `start`; None where it goes on."""
        if self._is_escaped and start < len(text):
            self._is_escaped = False
            start += 1
        while (found := _STRUCTURAL.search(text, start)) is not None:
            start = found.end()
            char = found[0]
            if self._is_string:
                if char == "\\":
                    if start == len(text):
                        self._is_escaped = True
                    start += 1
                elif char == '"':
                    self._is_string = False
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return start
        return None


def _call_of(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of a whole call; None where it is none."""
    value = _decoded(text)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None:
        return value["name"], "{}"
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _decoded(text: str) -> object:
    """None where it is no JSON, or names half of a character alone (a lone surrogate), which no answer can be written with."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _tail_that_may_become(text: str, mark: str) -> int:
    """Length of the tail of `text` that may be the start of `mark`, with the space in front of it. A mark's only "<" is its first."""
    start = text.rfind("<", max(len(text) - len(mark) + 1, 0))
    body = text[:start] if start >= 0 and mark.startswith(text[start:]) else text
    return len(text) - len(body.rstrip(_SPACE))


def _reasoned(text: str) -> list[OutputPart]:
    return [ReasoningPart(text)] if text else []
