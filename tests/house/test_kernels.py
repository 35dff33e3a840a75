"""Every public op of duomo_kernels has a reference, a test, a benchmark and a row in the table. Knows no maths."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_tree import ROOT, plant, read

ROOM = "kernels/duomo_kernels"


def test_every_op_is_whole() -> None:
    found = [problem for op in ops(ROOT) for problem in lacks(op, ROOT)]
    assert not found, "\n".join(found)


def ops(root: Path) -> list[str]:
    """One op a file; names that start with an underscore are shared inside the room."""
    return sorted(path.stem for path in (root / ROOM).glob("*.py") if not path.stem.startswith("_"))


def lacks(op: str, root: Path) -> list[str]:
    found = []
    tree = read(root, root / ROOM / f"{op}.py").tree
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if not any(name == "reference" or name.endswith("_reference") for name in functions):
        found.append(f"{ROOM}/{op}.py: no function called reference or *_reference")
    found += [f"{path}: missing" for path in (f"tests/kernels/test_{op}.py", f"bench/kernels/bench_{op}.py") if not (root / path).is_file()]
    readme = root / "kernels" / "README.md"
    if not readme.is_file() or f"| `{op}` |" not in readme.read_text():
        found.append(f"kernels/README.md: no row for `{op}`")
    return found


def unannotated(root: Path) -> list[str]:
    """Functions of the room, Triton's kernels apart, that lack an annotation."""
    found = []
    for path in sorted((root / ROOM).glob("*.py")):
        for node in ast.walk(read(root, path).tree):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if node.returns is None or any(argument.annotation is None for argument in arguments if argument.arg != "self"):
                found.append(f"{ROOM}/{path.name}: {node.name} is not annotated")
    return found


def test_what_is_not_a_kernel_is_annotated(tmp_path: Path) -> None:
    assert not unannotated(ROOT), "\n".join(unannotated(ROOT))
    plant(tmp_path, f"{ROOM}/combine.py", "@triton.jit\ndef body(x): ...\ndef combine(x) -> None: ...\n")
    assert unannotated(tmp_path) == [f"{ROOM}/combine.py: combine is not annotated"]


def _whole(root: Path) -> None:
    plant(root, f"{ROOM}/combine.py", "def combine_reference(): ...\ndef combine(): ...\n")
    plant(root, f"{ROOM}/_launch.py", "")
    plant(root, "tests/kernels/test_combine.py", "")
    plant(root, "bench/kernels/bench_combine.py", "")
    (root / "kernels" / "README.md").write_text("| `combine` | yes |\n")


def test_a_whole_op_passes(tmp_path: Path) -> None:
    _whole(tmp_path)
    assert ops(tmp_path) == ["combine"] and lacks("combine", tmp_path) == []


@pytest.mark.parametrize("gone", ["tests/kernels/test_combine.py", "bench/kernels/bench_combine.py", "kernels/README.md"])
def test_a_planted_gap_is_caught(tmp_path: Path, gone: str) -> None:
    _whole(tmp_path)
    (tmp_path / gone).unlink()
    assert len(lacks("combine", tmp_path)) == 1


def test_an_op_without_a_reference_is_caught(tmp_path: Path) -> None:
    _whole(tmp_path)
    plant(tmp_path, f"{ROOM}/combine.py", "def combine(): ...\n")
    assert len(lacks("combine", tmp_path)) == 1
