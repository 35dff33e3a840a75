"""The tools of a request, checked: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`. Knows no template and no model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from duomo.errors import RequestError
from services.router.conversation import FunctionTool, ToolUse
from services.router.fields import Fields, wrong_type

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


def read_tool_use(fields: Fields) -> ToolUse:
    """Of a chat completion. `strict` is read and changes nothing: a call that must be made is held to its schema."""
    raw = fields.array("tools") or []
    tools = tuple(_tool(f"tools[{idx}]", value) for idx, value in enumerate(raw))
    check_names([tool.name for tool in tools], lambda idx: f"tools[{idx}].function.name")
    choice = fields.take("tool_choice")
    named = _named(choice) if isinstance(choice, dict) else None
    is_parallel = fields.boolean("parallel_tool_calls", default=True)
    return tool_use_of(tools, "named" if named is not None else choice, named, is_parallel)


def tool_use_of(tools: tuple[FunctionTool, ...], choice: object, named: str | None, is_parallel: bool) -> ToolUse:
    """With `tool_choice` as a word, or "named" and the name; refuses by that field's name."""
    if choice is None:
        choice = "auto"
    if not isinstance(choice, str):
        raise wrong_type("tool_choice", "a string or an object", choice)
    if choice not in ("auto", "none", "required", "named") or (choice == "named" and named is None):
        detail = f"'tool_choice' must be auto, none, required or a function's name in an object, got '{choice}'."
        raise RequestError(detail, param="tool_choice")
    if choice in ("required", "named") and not tools:
        raise RequestError("'tool_choice' asks for a call, but 'tools' names none.", param="tool_choice")
    if named is not None and named not in {tool.name for tool in tools}:
        raise RequestError(f"'tool_choice' names '{named}', which is none of 'tools'.", param="tool_choice")
    if choice == "required":
        return ToolUse(tools, "required", None, is_parallel)
    if choice == "named":
        return ToolUse(tools, "named", named, is_parallel)
    return ToolUse(tools, "none" if choice == "none" else "auto", None, is_parallel)


def function_tool(fields: Fields, parameters_field: str) -> FunctionTool:
    """The name, description and schema of one function, wherever an endpoint keeps them; takes them out of `fields`."""
    name = fields.string("name")
    where = fields.name("name")
    if name is None:
        raise RequestError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
    if not _NAME.fullmatch(name):
        raise RequestError(f"'{where}' must be 1 to 128 letters, digits, '_' or '-'.", param=where)
    description = fields.string("description")
    parameters = fields.mapping(parameters_field)
    if parameters is not None and parameters.get("type", "object") != "object":
        where = fields.name(parameters_field)
        raise RequestError(f"'{where}' must be a JSON schema of type 'object'.", param=where)
    return FunctionTool(name, description, parameters, fields.name(parameters_field))


def check_names(names: list[str], where: Callable[[int], str]) -> None:
    """Refuses a name that stands for two functions."""
    seen: set[str] = set()
    for idx, name in enumerate(names):
        if name in seen:
            raise RequestError(f"'{where(idx)}' is '{name}' a second time.", param=where(idx))
        seen.add(name)


def _tool(name: str, value: object) -> FunctionTool:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    kind = fields.string("type")
    if kind != "function":
        raise RequestError(f"'{name}.type' must be 'function', got {'nothing' if kind is None else repr(kind)}.", param=f"{name}.type")
    raw = fields.mapping("function")
    if raw is None:
        raise RequestError(f"You must provide '{name}.function'.", param=f"{name}.function", code="missing_required_parameter")
    fields.finish()
    function = Fields(raw, f"{name}.function.")
    tool = function_tool(function, "parameters")
    function.boolean("strict")
    function.finish()
    return tool


def _named(choice: dict[str, object]) -> str:
    fields = Fields(choice, "tool_choice.")
    kind = fields.string("type")
    if kind != "function":
        raise RequestError("'tool_choice.type' must be 'function'.", param="tool_choice.type")
    function = Fields(fields.mapping("function") or {}, "tool_choice.function.")
    name = function.string("name")
    if name is None:
        raise RequestError(
            "You must provide 'tool_choice.function.name'.", param="tool_choice.function.name", code="missing_required_parameter"
        )
    function.finish()
    fields.finish()
    return name
