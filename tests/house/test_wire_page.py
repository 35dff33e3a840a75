"""Every message has golden bytes and stands in docs/wire.md. Knows the page by its text alone, and no codec."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from source_tree import ROOT, Source, plant, read

PAGE = "duomo/wire/messages.py"
GOLDEN = "tests/wire/golden"


def test_every_message_has_golden_bytes() -> None:
    names = messages(read(ROOT, ROOT / PAGE))
    assert {"Hello", "StartPrefill", "TokensEmitted", "ReplicaReport"} <= set(names)
    assert not without_golden_bytes(names, ROOT)


def test_every_message_is_written_about() -> None:
    text = (ROOT / "docs" / "wire.md").read_text()
    missing = [name for name in messages(read(ROOT, ROOT / PAGE)) if f"`{name}`" not in text]
    assert not missing, f"docs/wire.md says nothing of {missing}"


def test_every_message_is_in_the_union() -> None:
    page = read(ROOT, ROOT / PAGE)
    assert not outside_the_union(page)


def messages(page: Source) -> list[str]:
    """Public classes that descend from _Message, in the order of the page."""
    parents = {node.name: [ast.unparse(base) for base in node.bases] for node in page.tree.body if isinstance(node, ast.ClassDef)}

    def is_message(name: str) -> bool:
        return any(base == "_Message" or (base in parents and is_message(base)) for base in parents[name])

    return [name for name in parents if not name.startswith("_") and is_message(name)]


def without_golden_bytes(names: list[str], root: Path) -> list[str]:
    """Messages without tests/wire/golden/<Name>.hex, or with one that is not hexadecimal; and golden files of no message."""
    found = []
    for name in names:
        file = root / GOLDEN / f"{name}.hex"
        if not file.is_file() or not re.fullmatch(r"(?:[0-9a-f]{2})+", "".join(file.read_text().split())):
            found.append(f"{GOLDEN}/{name}.hex")
    known = set(names)
    return found + [
        f"{file.name}: no such message" for file in (root / GOLDEN).glob("*.hex") if file.stem.split(".")[0].split("-")[0] not in known
    ]


def outside_the_union(page: Source) -> list[str]:
    """Messages that the codec would never decode: named in neither union at the page's end."""
    unions = [node.value for node in page.tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp)]
    named = {node.id for union in unions for node in ast.walk(union) if isinstance(node, ast.Name)}
    return [name for name in messages(page) if name not in named]


PLANTED = '''"""Messages of a test."""
class _Message: ...
class _Inner(_Message): ...
class Value: ...
class Hello(_Message): ...
class Bye(_Inner): ...
Message = Hello | Value
'''


def test_a_message_without_bytes_is_caught(tmp_path: Path) -> None:
    page = plant(tmp_path, PAGE, PLANTED)
    assert messages(page) == ["Hello", "Bye"]
    (tmp_path / GOLDEN).mkdir(parents=True)
    (tmp_path / GOLDEN / "Hello.hex").write_text("81 a4\n74\n")
    (tmp_path / GOLDEN / "Bye.hex").write_text("")
    assert without_golden_bytes(["Hello", "Bye"], tmp_path) == [f"{GOLDEN}/Bye.hex"]
    (tmp_path / GOLDEN / "Bye.hex").write_text("81a")
    assert without_golden_bytes(["Hello", "Bye"], tmp_path) == [f"{GOLDEN}/Bye.hex"]
    (tmp_path / GOLDEN / "Bye.hex").unlink()
    (tmp_path / GOLDEN / "Gone.hex").write_text("81")
    assert without_golden_bytes(["Hello", "Bye"], tmp_path) == [f"{GOLDEN}/Bye.hex", "Gone.hex: no such message"]


def test_a_message_outside_the_union_is_caught(tmp_path: Path) -> None:
    assert outside_the_union(plant(tmp_path, PAGE, PLANTED)) == ["Bye"]
    assert outside_the_union(plant(tmp_path, PAGE, PLANTED.replace("| Value", "| Bye"))) == []
