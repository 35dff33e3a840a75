"""File names, shelves and first lines. Owns the list of forbidden rooms; knows no content below the first line."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from source_tree import PRODUCT, ROOT, SHELVES, Source, plant, sources

FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "base", "core", "misc", "manager"}
_LOOSE_ENDS = re.compile(r"\b(TODO|FIXME|XXX)\b")
_MARK = re.compile(r"#\s*(?:noqa(?::\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*)?|type:\s*ignore(?:\[[\w\-, ]+\])?)")


def test_no_room_is_a_drawer() -> None:
    assert not drawers(ROOT)


def test_shelves_are_no_packages() -> None:
    assert not packages_where_none_may_be(ROOT)


def test_first_lines_say_what_a_file_owns() -> None:
    found = [problem for source in sources(ROOT) for problem in untitled(source)]
    assert not found, "\n".join(found)


def test_every_silenced_check_has_a_reason() -> None:
    found = [problem for source in sources(ROOT, (*PRODUCT, "tests")) for problem in unreasoned(source)]
    assert not found, "\n".join(found)


def test_nothing_is_unfinished() -> None:
    found = [problem for source in sources(ROOT, (*PRODUCT, "tests")) for problem in unfinished(source)]
    assert not found, "\n".join(found)


def drawers(root: Path) -> list[str]:
    """Files and folders of Python code with a name that owns nothing, or cut into parts."""
    found = []
    for source in sources(root, (*PRODUCT, "tests")):
        parts = source.path.removesuffix(".py").split("/")
        found += [f"{source.path}: {part}" for part in parts if part in FORBIDDEN or re.search(r"_part\d+$", part)]
    return found


def packages_where_none_may_be(root: Path) -> list[str]:
    shelves = [f"{shelf}/__init__.py" for shelf in SHELVES if (root / shelf / "__init__.py").exists()]
    return shelves + [path.relative_to(root).as_posix() for path in (root / "tests").rglob("__init__.py")]


def untitled(source: Source) -> list[str]:
    """The first line is the docstring's: at least 20 characters, and it ends as a sentence does."""
    title = (ast.get_docstring(source.tree) or "").split("\n\n")[0].strip()
    starts = source.lines[0].lstrip("#!") if source.lines else ""
    if starts.startswith("/usr/bin/env") and len(source.lines) > 1:
        starts = source.lines[1]
    if len(title) >= 20 and starts.startswith(('"""', 'r"""')):
        return []
    return [f"{source.path}:1 the first line says what the file owns and what it does not know"]


def unreasoned(source: Source) -> list[str]:
    """`# noqa` and `# type: ignore` name a code and carry a reason in the same line."""
    found = []
    if not _MARK.search(source.text):
        return []  # most files: splitting all of them into tokens takes seconds
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type != tokenize.COMMENT or not (mark := _MARK.search(token.string)):
            continue
        reason = (token.string[: mark.start()] + token.string[mark.end() :]).strip(" #:-")
        if len(reason) < 10:
            found.append(f"{source.path}:{token.start[0]} {token.string}: no reason in the same line")
    return found


def unfinished(source: Source) -> list[str]:
    found = []
    if re.search(_LOOSE_ENDS, source.text):
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and re.search(_LOOSE_ENDS, token.string):
                found.append(f"{source.path}:{token.start[0]} {token.string}")
    may_be_bare = "NotImplementedError" in source.text or re.search(r"\bexcept\s*:", source.text)
    for node in ast.walk(source.tree) if may_be_bare else ():
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            found.append(f"{source.path}:{node.lineno} NotImplementedError: no stubs")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{source.path}:{node.lineno} bare except")
    return found


@pytest.mark.parametrize("path", ["duomo/utils.py", "duomo/core/blocks.py", "services/router/helpers.py", "duomo/engine/runner_part2.py"])
def test_a_planted_drawer_is_caught(tmp_path: Path, path: str) -> None:
    plant(tmp_path, path, "")
    plant(tmp_path, "duomo/engine/blocks.py", "")
    assert [each.split(":")[0] for each in drawers(tmp_path)] == [path]


@pytest.mark.parametrize("path", ["services/__init__.py", "kernels/__init__.py", "tests/wire/__init__.py"])
def test_a_planted_package_is_caught(tmp_path: Path, path: str) -> None:
    plant(tmp_path, path, "")
    plant(tmp_path, "services/router/__init__.py", "")
    assert packages_where_none_may_be(tmp_path) == [path]


@pytest.mark.parametrize(
    "text", ["", "import os\n", '"""Short."""\n', 'import os\n"""Owns the world and knows nothing of it."""\n', "# owns it\n"]
)
def test_a_planted_silence_is_caught(tmp_path: Path, text: str) -> None:
    assert untitled(plant(tmp_path, "duomo/x.py", text))
    assert not untitled(plant(tmp_path, "duomo/y.py", '"""Owns blocks; knows no tensor."""\n' + text))


@pytest.mark.parametrize(("mark", "has_reason"), [("", False), ("  # upstream ships no types", True), (" ok", False)])
@pytest.mark.parametrize("kind", ["# no" + "qa", "# no" + "qa: E501", "# type: " + "ignore[import-untyped]"])
def test_a_planted_silencing_is_caught(tmp_path: Path, kind: str, mark: str, has_reason: bool) -> None:
    assert bool(unreasoned(plant(tmp_path, "duomo/x.py", f"import os  {kind}{mark}\n"))) is not has_reason


@pytest.mark.parametrize("text", ["# TO" + "DO later\n", "raise NotImplemented" + "Error\n", "try:\n    f()\nexcept:\n    pass\n"])
def test_planted_loose_ends_are_caught(tmp_path: Path, text: str) -> None:
    assert len(unfinished(plant(tmp_path, "duomo/x.py", text))) == 1
    assert not unfinished(plant(tmp_path, "duomo/y.py", "try:\n    f()\nexcept OSError:\n    pass\n"))
