"""What the docs name exists, and what the code names stands in the docs. Owns the conventions; knows no prose.

docs/metrics.md names each metric and span as `name`. docs/walk.md names places as `path` or `path/file.py:Class.method`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from source_tree import ROOT, Source, dotted, plant, read, sources

METRICS = {"Counter", "Gauge", "Histogram", "Summary", "Info"}
SPANS = {"start_span", "record_span"}
EVENTS = {"event"}
_PLACE = re.compile(r"`((?:services|duomo|kernels|models|deploy|tests|bench|docs)/[\w./*-]*)(?::([\w.]+))?(?:\(\))?`")


def test_every_metric_and_span_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    found = [problem for source in sources(ROOT, ("services", "duomo")) for problem in undocumented(source, text) + uncounted(source, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", ["docs/walk.md", "README.md", "CONTRIBUTING.md", "docs/terms.md", "docs/wire.md", "docs/operations.md"])
def test_pages_name_only_what_exists(page: str) -> None:
    found = unreal(page, ROOT)
    assert not found, "\n".join(found)


def test_the_walk_names_functions() -> None:
    places = _PLACE.findall((ROOT / "docs" / "walk.md").read_text())
    assert len({path for path, name in places if name}) >= 8


def undocumented(source: Source, text: str) -> list[str]:
    """Names given to metric and span makers that docs/metrics.md lacks, and names that cannot be read off the code."""
    constants = {
        target.id: node.value.value
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call) or not (kind := dotted(node.func).split(".")[-1]):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        if kind not in METRICS | SPANS | (EVENTS if is_method else set()) or not node.args:
            continue
        first = node.args[0]
        name = constants.get(first.id) if isinstance(first, ast.Name) else first.value if isinstance(first, ast.Constant) else None
        if isinstance(name, str) and f"`{name}`" not in text:
            found.append(f"{source.path}:{node.lineno} {kind} `{name}` is not in docs/metrics.md")
        is_maker = "tracing" in dotted(node.func).split(".")[-2:][0] and not source.path.startswith("duomo/telemetry/")
        if name is None and kind in SPANS and is_maker:
            found.append(f"{source.path}:{node.lineno} {kind}: the name has to be a literal or a constant of the file")
    return found


def uncounted(source: Source, text: str) -> list[str]:
    """Keys of a replica's counters that docs/metrics.md lacks; `f"failed_{error.code}"` stands there as failed_<code>."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Subscript) or dotted(node.value).split(".")[-1] != "counters":
            continue
        parts = node.slice.values if isinstance(node.slice, ast.JoinedStr) else [node.slice]
        name = "".join(_part(part) for part in parts)
        if name and f"`{name}`" not in text:
            found.append(f"{source.path}:{node.lineno} counter `{name}` is not in docs/metrics.md")
    return found


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.FormattedValue):
        return f"<{dotted(node.value).split('.')[-1]}>"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def unreal(page: str, root: Path) -> list[str]:
    """Paths in backticks that are not there, and names that their files do not define."""
    found = []
    for path, name in _PLACE.findall((root / page).read_text()):
        if not list(root.glob(path.rstrip("/"))):
            found.append(f"{page}: {path} does not exist")
        elif name and name not in defined(read(root, root / path)):
            found.append(f"{page}: {path} defines no {name}")
    return found


def defined(source: Source) -> set[str]:
    """Classes, functions, methods and module constants, qualified by their class."""
    names = {
        target.id for node in source.tree.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)
    }
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    return names


@pytest.mark.parametrize(
    ("line", "is_caught"),
    [
        ('Counter("duomo_new_total", "text")', True),
        ('Counter("duomo_old_total", "text")', False),
        ('NAME = "duomo_new_s"\nHistogram(NAME, "text")', True),
        ('tracing.start_span("gateway.new")', True),
        ('tracing.record_span("gateway.old", None, 0.0, 1.0)', False),
        ("tracing.start_span(name)", True),
        ("self._tracing.record_span(f'{name}.x', None, 0.0, 1.0)", True),
        ("accounting.start_span(parent)", False),
        ('span.event("new_event")', True),
        ('event("whatever")', False),
        ('collections.Counter(["a"])', False),
    ],
)
def test_a_planted_name_is_caught(tmp_path: Path, line: str, is_caught: bool) -> None:
    text = "| `duomo_old_total` | `gateway.old` |"
    assert bool(undocumented(plant(tmp_path, "services/router/x.py", line), text)) is is_caught


@pytest.mark.parametrize(
    ("line", "is_caught"),
    [
        ('self.counters["new"] += 1', True),
        ('self.counters["old"] += 1', False),
        ('self.counters[f"new_{error.code}"] += 1', True),
        ('counters[f"old_{error.code}"] += 1', False),
        ('others["new"] += 1', False),
    ],
)
def test_a_planted_counter_is_caught(tmp_path: Path, line: str, is_caught: bool) -> None:
    assert bool(uncounted(plant(tmp_path, "services/router/x.py", line), "| `old`, `old_<code>` |")) is is_caught


def test_a_planted_path_is_caught(tmp_path: Path) -> None:
    plant(tmp_path, "duomo/x.py", "Y = 1\nclass A:\n    def b(self): ...\ndef c(): ...\n")
    page = tmp_path / "docs" / "walk.md"
    page.parent.mkdir()
    page.write_text("`duomo/x.py`, `duomo/x.py:A.b`, `duomo/x.py:c()`, `duomo/x.py:Y`, `duomo/`, `duomo/*.py`, `make x`")
    assert unreal("docs/walk.md", tmp_path) == []
    page.write_text("`duomo/gone.py` and `duomo/x.py:A.c` and `duomo/x.py:b`")
    assert len(unreal("docs/walk.md", tmp_path)) == 3
