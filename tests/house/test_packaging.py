"""What an installation brings and what CI runs: pyproject.toml, constraints.txt, Makefile, .ci/run. Knows no code but its imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from source_tree import ROOT, Source, imported, plant, sources

# Distribution of an import where the two names differ.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "nixl_cu13": "nixl-cu13",
    "opentelemetry": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
    "starlette": "fastapi",
    "click": "typer",
    "pydantic_core": "pydantic",
}
TARGETS = ("serve", "test", "test-slow", "check", "audit", "test-py312", "clean")


def test_the_gateway_installs_no_torch() -> None:
    groups = requirements(ROOT)
    assert {"", "gateway", "engine", "gpu", "dev"} <= set(groups)
    assert not {"torch", "triton", "nixl-cu13"} & (groups[""] | groups["gateway"])
    assert {"torch", "nixl-cu13"} <= groups["engine"] and "triton" in groups["gpu"]


def test_torch_is_pinned_once_and_triton_never() -> None:
    pyproject, constraints = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()
    assert re.findall(r"^torch(.*)$", constraints, re.M) == ["==2.13.0"]
    assert not re.search(r"^triton", constraints, re.M)
    assert not re.search(r"\"(torch|triton)(==|<|~)", pyproject)


def test_every_direct_dependency_has_a_tested_version() -> None:
    pinned = {_canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = set().union(*requirements(ROOT).values()) - {"triton", "duomo"}
    assert wanted <= pinned, wanted - pinned


def test_what_dependencies_bring_is_pinned_too() -> None:
    """By .ci/pins, in a part of its own: a vulnerability or a bad release comes in by whatever is not."""
    own, brought = (ROOT / "constraints.txt").read_text().split("# Brought by those above, as tested; written by .ci/pins.\n")
    names = [[_canonical(line.split("==")[0]) for line in part.splitlines() if "==" in line] for part in (own, brought)]
    assert len(set(names[0] + names[1])) == len(names[0]) + len(names[1]), "each once"
    assert {"h11", "anyio", "urllib3", "certifi", "markupsafe", "aiohttp"} <= set(names[1]) and names[1] == sorted(names[1])
    assert not {"setuptools", "triton"} & set(names[1]), "torch's builds differ in them"


def test_every_import_is_declared() -> None:
    groups = requirements(ROOT)
    declared = groups[""] | groups["gateway"] | groups["engine"] | groups["gpu"]
    found = [problem for source in sources(ROOT, ("services", "duomo", "kernels")) for problem in undeclared(source, declared)]
    assert not found, "\n".join(found)


def test_make_knows_its_targets() -> None:
    for target in TARGETS:
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"make {target}: {result.stderr}"


def test_ci_runs_the_checks_and_the_short_lane() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    lines = {line.split(" <")[0].strip() for line in script.read_text().splitlines()}
    assert {"set -euo pipefail", "make check", "make audit", "make test"} <= lines


def test_pre_commit_fetches_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for repo in config["repos"] for hook in repo["hooks"]} == {"system"}


def requirements(root: Path) -> dict[str, set[str]]:
    """Distribution names of each extra ("" is the base), without those that an extra takes from another."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {group: {_canonical(re.split(r"[\[<>=!~; ]", each)[0]) for each in lines} for group, lines in groups.items()}


def undeclared(source: Source, declared: set[str]) -> list[str]:
    """Third-party imports that no extra brings."""
    found = []
    for name, line in sorted(imported(source)):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in ("duomo", "services", "duomo_kernels"):
            continue
        if _canonical(DISTRIBUTIONS.get(top, top)) not in declared:
            found.append(f"{source.path}:{line} {top}: no extra of pyproject.toml brings it")
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def test_a_planted_import_is_caught(tmp_path: Path) -> None:
    source = plant(tmp_path, "duomo/x.py", "import os\nimport yaml\nimport leftpad.inner\nfrom duomo.wire import codec\n")
    assert undeclared(source, {"pyyaml"}) == ["duomo/x.py:3 leftpad: no extra of pyproject.toml brings it"]


def test_a_planted_requirement_is_read(tmp_path: Path) -> None:
    lines = [
        "[project]",
        """dependencies = ["Py_YAML>=6", "ray[serve]>=2; sys_platform == 'linux'"]""",
        "[project.optional-dependencies]",
        'gateway = ["torch"]',
    ]
    (tmp_path / "pyproject.toml").write_text("\n".join(lines))
    assert requirements(tmp_path) == {"": {"py-yaml", "ray"}, "gateway": {"torch"}}
