"""The caps: files, functions and parameters. Owns the numbers; knows no room.

Not counted as parameters: self and cls, those of @triton.jit bodies and their launchers, of typer commands and of FastAPI routes.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_tree import PRODUCT, ROOT, Source, dotted, plant, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_JIT_LINES = 120
MAX_PARAMETERS = 7

_ROUTES = {"get", "post", "put", "delete", "patch", "head", "options", "websocket", "exception_handler", "middleware"}
_COMMANDS = {"command", "callback"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_the_tree_keeps_the_caps() -> None:
    found = [problem for source in sources(ROOT, (*PRODUCT, "tests")) for problem in violations(source)]
    assert not found, "\n".join(found)


def violations(source: Source) -> list[str]:
    found = []
    if len(source.lines) > MAX_FILE_LINES:
        found.append(f"{source.path}: {len(source.lines)} lines (at most {MAX_FILE_LINES}): find the missing noun")
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            found += _of_function(source, node)
    return found


def _of_function(source: Source, node: Function) -> list[str]:
    where = f"{source.path}:{node.lineno} {node.name}"
    found = []
    is_jit = any(name.split(".")[-1] == "jit" and "triton" in name for name in _decorators(node))
    cap = MAX_JIT_LINES if is_jit else MAX_FUNCTION_LINES
    num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if num_lines > cap:
        found.append(f"{where}: {num_lines} lines (at most {cap})")
    num_parameters = _num_parameters(node)
    if num_parameters > MAX_PARAMETERS and not (is_jit or _launches(node) or _is_door(node)):
        found.append(f"{where}: {num_parameters} parameters (at most {MAX_PARAMETERS}, else a dataclass)")
    return found


def _decorators(node: Function) -> list[str]:
    return [dotted(each.func if isinstance(each, ast.Call) else each) for each in node.decorator_list]


def _num_parameters(node: Function) -> int:
    arguments = node.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if names and names[0] in ("self", "cls"):
        names = names[1:]
    return len(names) + (arguments.vararg is not None) + (arguments.kwarg is not None)


def _launches(node: Function) -> bool:
    """A launcher calls a kernel as `kernel[grid](...)`."""
    return any(isinstance(each, ast.Call) and isinstance(each.func, ast.Subscript) for each in ast.walk(node))


def _is_door(node: Function) -> bool:
    """A typer command or a FastAPI route: `@app.command()`, `@router.post("/x")`."""
    return any("." in name and name.split(".")[-1] in _ROUTES | _COMMANDS for name in _decorators(node))


LONG = "def f():\n" + "    x = 1\n" * 60
LONG_JIT = "@triton.jit\ndef f(a, b, c, d, e, f, g, h):\n" + "    x = 1\n" * 100


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("x = 1\n" * 401, "401 lines"),
        (LONG, "61 lines"),
        (LONG.replace("def", "async def"), "61 lines"),
        (LONG_JIT + "    x = 1\n" * 20, "121 lines"),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n", "8 parameters"),
        ("def f(a, b, c, d, e, f, *g, **h): ...\n", "8 parameters"),
        ("@cached(1)\ndef f(a, b, c, d, e, f, g, *, h): ...\n", "8 parameters"),
    ],
)
def test_a_planted_giant_is_caught(tmp_path: Path, text: str, word: str) -> None:
    found = violations(plant(tmp_path, "duomo/giant.py", text))
    assert len(found) == 1 and word in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * 400,
        LONG.replace("    x = 1\n", "", 1),
        LONG_JIT,
        "class A:\n    def f(self, a, b, c, d, e, f, g): ...\n",
        "@app.command()\ndef f(a, b, c, d, e, f, g, h): ...\n",
        "@app.post('/x')\nasync def f(a, b, c, d, e, f, g, h): ...\n",
        "def launch(a, b, c, d, e, f, g, h):\n    kernel[(1,)](a)\n",
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, text: str) -> None:
    assert violations(plant(tmp_path, "duomo/fine.py", text)) == []
