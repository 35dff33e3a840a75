"""The skeleton of the four services and their READMEs' headings. Knows no code."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_tree import ROOT

SKELETON = ("__init__.py", "README.md", "policy.py", "service.py", "deployment.py")
SERVICES = {
    "router": (*SKELETON, "app.py", "admission.py", "pools.py"),
    "prefill": (*SKELETON, "worker.py"),
    "decode": (*SKELETON, "worker.py"),
    "kv_transfer": (*SKELETON, "layout.py", "lifetime.py", "agent.py", "directory.py"),
}
HEADINGS = ("## What it owns", "## Its messages", "## Its metrics", "## How it fails", "## How to run it alone")


def test_every_service_has_the_skeleton() -> None:
    assert not missing_bones(ROOT)


def test_every_service_says_the_same_things() -> None:
    found = [f"{name}: {problem}" for name in SERVICES for problem in misread((ROOT / "services" / name / "README.md").read_text())]
    assert not found, "\n".join(found)


def test_no_fifth_service_hides_on_the_shelf() -> None:
    folders = {path.name for path in (ROOT / "services").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(SERVICES)


def missing_bones(root: Path) -> list[str]:
    return [
        f"services/{name}/{bone}" for name, bones in SERVICES.items() for bone in bones if not (root / "services" / name / bone).is_file()
    ]


def misread(readme: str) -> list[str]:
    """The same headings in the same order, with something below each."""
    headings = tuple(line.strip() for line in readme.splitlines() if line.startswith("## "))
    if headings != HEADINGS:
        return [f"headings are {', '.join(headings) or 'missing'}; they are {', '.join(HEADINGS)}"]
    bodies = readme.split("\n## ")[1:]
    return [f"nothing below {HEADINGS[i]}" for i, body in enumerate(bodies) if not "".join(body.splitlines()[1:]).strip()]


@pytest.mark.parametrize("bone", ["services/prefill/worker.py", "services/router/README.md", "services/kv_transfer/policy.py"])
def test_a_missing_bone_is_caught(tmp_path: Path, bone: str) -> None:
    for name, bones in SERVICES.items():
        for each in bones:
            file = tmp_path / "services" / name / each
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    assert missing_bones(tmp_path) == []
    (tmp_path / bone).unlink()
    assert missing_bones(tmp_path) == [bone]


WHOLE = "# X\n\n" + "\n\n".join(f"{heading}\n\nwords" for heading in HEADINGS)


def test_a_planted_readme_is_caught() -> None:
    assert misread(WHOLE) == []
    assert misread(WHOLE.replace("## Its metrics", "## Metrics"))
    assert misread(WHOLE.replace("## How it fails\n\nwords", "## How it fails\n")) == ["nothing below ## How it fails"]
    assert misread("\n".join(WHOLE.splitlines()[:4]))
