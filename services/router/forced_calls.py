"""What holds a model to calling a tool: a grammar of its output, in the form that markup.py reads. Knows no request and no token.

Each function's arguments are a JSON schema of their own in it, so that `$ref` and `$defs` mean what they mean in the client's schema.
"""

from __future__ import annotations

import json
from typing import Final

from duomo.grammar.library import ITEM_SEPARATOR, KEY_SEPARATOR
from duomo.wire.values import Constraint
from services.router.conversation import FunctionTool, ToolUse
from services.router.markup import CALL, END_CALL, END_THINK, THINK, OutputStyle
from services.router.structured import Structure, json_schema, schema_text

# As for every JSON schema (duomo/grammar/library.py): one line, at most one space behind a comma or a colon.
_JSON_OPTIONS: Final = {
    "whitespace_flexible": False,
    "item_separator": ITEM_SEPARATOR,
    "key_separator": KEY_SEPARATOR,
    "coerce_one_of": False,
    "lenient": False,
}
_THOUGHT: Final = r"thought[lazy]: /(.|\n)*" + END_THINK.replace("/", r"\/") + "/"
_LINES: Final = r"/\n{0,2}/"


def forced_calls(tool_use: ToolUse, style: OutputStyle) -> Structure | None:
    """None where no call must be made. Else at least one, of a function that may be called; one where calls are not parallel, or named.

    A model that marks its reasoning may think before it calls; one that is inside already has to end that first.
    """
    if tool_use.choice not in ("required", "named"):
        return None
    tools = [tool for tool in tool_use.tools if tool_use.named in (None, tool.name)]
    calls = "(" + " | ".join(f"call{number}" for number in range(len(tools))) + ")"
    has_many = tool_use.is_parallel and tool_use.choice == "required"
    thinking = {"none": "", "outside": f'("{THINK}" thought {_LINES})? ', "inside": f"thought {_LINES} "}[style.reasoning]
    rules = [f"start: {thinking}{calls}" + (rf' ("\n" {calls})*' if has_many else "")]
    if thinking:
        rules.append(_THOUGHT)
    for number, tool in enumerate(tools):
        rules += _rules(number, tool)
    parts = tuple(Structure(json_schema(tool.parameters), tool.field) for tool in tools if tool.parameters is not None)
    return Structure(Constraint(kind="grammar", text="\n".join(rules) + "\n"), "tools", parts)


def _rules(number: int, tool: FunctionTool) -> list[str]:
    """Of one function, whose name needs no escapes (tools.py)."""
    head = f'{CALL}\n{{"name": "{tool.name}", "arguments": '
    parameters = {"type": "object", "properties": {}, "additionalProperties": False} if tool.parameters is None else tool.parameters
    schema = schema_text({"type": "object", **parameters, "x-guidance": _JSON_OPTIONS})
    return [
        f"call{number}: {json.dumps(head)} arguments{number} {json.dumps('}' + chr(10) + END_CALL)}",
        f"arguments{number}: %json {schema}",
    ]
