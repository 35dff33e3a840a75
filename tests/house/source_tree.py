"""Python files of a tree, each parsed where a rule asks for that, for the house tests. Knows no rule of the house."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELVES = ("services", "kernels")
PRODUCT = ("services", "kernels", "duomo", "bench")
_SKIPPED = {".venv", ".venv312", ".git", "__pycache__", "build", "dist", ".gpu"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One Python file. path is relative to the tree's root, posix."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def files(root: Path, rooms: tuple[str, ...], suffix: str = ".py") -> list[Path]:
    """All files of `rooms` below root that end with suffix, caches and environments left out, in a fixed order."""
    found = (path for room in rooms for path in (root / room).rglob(f"*{suffix}"))
    return sorted(path for path in found if not _SKIPPED & set(path.relative_to(root).parts))


def sources(root: Path, rooms: tuple[str, ...] = PRODUCT) -> list[Source]:
    """The same as `files`, read."""
    return [read(root, path) for path in files(root, rooms)]


def read(root: Path, path: Path) -> Source:
    return Source(path=path.relative_to(root).as_posix(), text=path.read_text())


def plant(root: Path, path: str, text: str) -> Source:
    """Write a file (a violation, mostly) into a scratch tree and read it."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return read(root, file)


def imported(source: Source) -> set[tuple[str, int]]:
    """(absolute module name, line) of every import, those inside functions and TYPE_CHECKING included."""
    found: set[tuple[str, int]] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add((node.module, node.lineno))
    return found


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else node.attr
    return ""
