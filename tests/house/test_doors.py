"""Who may import whom, beyond what import-linter can say. Owns the homes of third parties; knows no layer.

.importlinter holds the layers; here: third parties in one file each (function-level imports included), PURE files, the shelf
`services`, and what a small image really loads.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
from pathlib import Path, PurePosixPath

import pytest
from source_tree import ROOT, Source, imported, plant, sources

ROOMS = ("services", "duomo", "kernels")
# Third party -> the only files that may import it.
HOMES = {
    "nixl": ("services/kv_transfer/transport_nixl.py", "services/kv_transfer/transport_nixl_config.py"),
    "nixl_cu13": ("services/kv_transfer/transport_nixl.py", "services/kv_transfer/transport_nixl_config.py"),
    "redis": ("services/kv_transfer/directory.py", "services/router/store.py"),
    "ray": ("services/*/deployment.py", "services/app.py"),
    "llguidance": ("duomo/grammar/library.py",),
}
PURE = (
    "services/*/policy.py",
    "services/router/admission.py",
    "services/router/scaling.py",
    "services/kv_transfer/layout.py",
    "services/kv_transfer/lifetime.py",
    "duomo/parallel/placement.py",
)
IMPURE = {"torch", "triton", "ray", "nixl", "nixl_cu13", "redis", "asyncio", "time", "threading", "socket", "datetime", "os"}
IMPURE |= {"subprocess", "fastapi", "uvloop", "opentelemetry", "prometheus_client"}
TORCH_FREE = ("services/router/", "duomo/wire/", "duomo/grammar/", "duomo/telemetry/", "duomo/config.py", "duomo/errors.py")
HEAVY = {"torch", "triton", "nixl", "nixl_cu13"}
LIBRARY_NEVER = {"fastapi", "starlette", "uvicorn", "services"}


def test_the_doors_hold() -> None:
    found = [problem for source in sources(ROOT, ROOMS) for problem in forbidden(source)]
    assert not found, "\n".join(found)


def test_nothing_pickles() -> None:
    found = [
        f"{s.path}:{line} {name}" for s in sources(ROOT, ROOMS) for name, line in imported(s) if name in ("pickle", "cloudpickle", "dill")
    ]
    assert not found, "\n".join(found)


def test_services_is_this_shelf() -> None:
    import services.router

    assert getattr(services, "__file__", None) is None
    assert Path(services.router.__file__).parent == ROOT / "services" / "router"
    assert not shadows(sys.path)


def test_the_gateway_and_the_library_load_no_torch() -> None:
    """What is really loaded, by whatever way: each module in a new process."""
    modules = [each.path.removesuffix(".py").replace("/", ".") for each in sources(ROOT, ROOMS) if each.path.startswith(TORCH_FREE)]
    modules = sorted(name.removesuffix(".__init__") for name in modules if not name.endswith(".deployment"))
    assert modules
    assert not loads(modules, HEAVY, ROOT)


def forbidden(source: Source) -> list[str]:
    """Imports of this file that its place does not allow."""
    path = PurePosixPath(source.path)
    title = (ast.get_docstring(source.tree) or "").split("\n\n")[0]
    found = []
    for name, line in sorted(imported(source), key=lambda each: each[1]):
        top = name.split(".")[0]
        if top in HOMES and not any(path.match(home) for home in HOMES[top]):
            found.append(f"{path}:{line} {name} is imported in {' and '.join(HOMES[top])} alone")
        if top in IMPURE and (any(path.match(pure) for pure in PURE) or "PURE" in title):
            found.append(f"{path}:{line} {name}: this file is PURE")
        if top in HEAVY and source.path.startswith(TORCH_FREE):
            found.append(f"{path}:{line} {name}: the gateway's image stays small")
        if top in LIBRARY_NEVER and source.path.startswith(("duomo/", "kernels/")):
            found.append(f"{path}:{line} {name}: not in the library")
        if top == "duomo" and source.path.startswith("kernels/"):
            found.append(f"{path}:{line} {name}: kernels know torch and triton alone")
    return found


def shadows(search_path: list[str]) -> list[str]:
    """Regular packages called as our roots are, which would win over a shelf."""
    found = [Path(entry) / name / "__init__.py" for entry in search_path for name in ("services", "kernels")]
    return [path.as_posix() for path in found if path.exists()]


def loads(modules: list[str], heavy: set[str], root: Path) -> str:
    """Import all modules in one new process; which of `heavy` are in it then, "" for none."""
    lines = [f"import {name}" for name in modules]
    lines += ["import sys", f"print(' '.join(sorted({heavy!r} & set(sys.modules))))"]
    environment = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=root, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else result.stderr[-2000:]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("services/decode/worker.py", "import nixl_cu13._api as api\n"),
        ("services/kv_transfer/agent.py", "def f():\n    from nixl_cu13 import nixl_agent\n"),
        ("services/kv_transfer/service.py", "import redis.asyncio\n"),
        ("services/prefill/worker.py", "import ray\n"),
        ("services/cli.py", "from ray import serve\n"),
        ("services/prefill/policy.py", "import time\n"),
        ("services/prefill/policy.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"),
        ("duomo/telemetry/parts.py", '"""Parts that add up. PURE."""\nimport time\n'),
        ("services/kv_transfer/lifetime.py", "from asyncio import Queue\n"),
        ("services/router/text.py", "def f():\n    import torch\n"),
        ("duomo/wire/codec.py", "import triton\n"),
        ("duomo/engine/runner.py", "import ray\n"),
        ("duomo/engine/runner.py", "import services.app\n"),
        ("kernels/duomo_kernels/combine.py", "from duomo.errors import EngineError\n"),
    ],
)
def test_a_planted_arrow_is_caught(tmp_path: Path, path: str, text: str) -> None:
    assert len(forbidden(plant(tmp_path, path, text))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("services/kv_transfer/transport_nixl.py", "import nixl_cu13\n"),
        ("services/kv_transfer/directory.py", "import redis.asyncio\n"),
        ("services/decode/deployment.py", "import ray\n"),
        ("services/prefill/policy.py", "import timeit_free\nfrom dataclasses import dataclass\n"),
        ("duomo/engine/runner.py", "import torch\nimport time\n"),
    ],
)
def test_open_doors_are_open(tmp_path: Path, path: str, text: str) -> None:
    assert forbidden(plant(tmp_path, path, text)) == []


def test_a_planted_shadow_is_caught(tmp_path: Path) -> None:
    plant(tmp_path, "site/services/__init__.py", "")
    assert len(shadows([str(tmp_path), str(tmp_path / "site")])) == 1


def test_a_planted_load_is_caught(tmp_path: Path) -> None:
    plant(tmp_path, "gate.py", "import inner\n")
    plant(tmp_path, "inner.py", "import colorsys\n")
    assert loads(["gate"], {"colorsys"}, tmp_path) == "colorsys"
    assert loads(["gate"], {"wave"}, tmp_path) == ""
    assert "ModuleNotFoundError" in loads(["nothing_there"], {"wave"}, tmp_path)


CONTRACT_FILES = {
    "services/cli.py": "",
    "services/app.py": "",
    "services/router/policy.py": "",
    "services/prefill/policy.py": "",
    "services/decode/policy.py": "",
    "services/kv_transfer/directory.py": "",
    "duomo/engine/runner.py": "",
    "duomo/models/config.py": "",
    "duomo/telemetry/metrics.py": "",
    "duomo/grammar/state.py": "",
    "duomo/wire/codec.py": "",
    "duomo/config.py": "",
    "duomo/errors.py": "",
    "kernels/duomo_kernels/combine.py": "",
}


@pytest.mark.parametrize(
    ("path", "text", "broken"),
    [
        ("services/router/policy.py", "", None),
        ("services/prefill/policy.py", "import services.decode.policy\n", "Layers, top to bottom"),
        ("services/kv_transfer/directory.py", "import services.router.policy\n", "Layers, top to bottom"),
        ("duomo/errors.py", "import duomo.config\n", "Layers, top to bottom"),
        ("duomo/engine/runner.py", "import services.app\n", "Layers, top to bottom"),
        ("duomo/telemetry/metrics.py", "import torch\n", "The gateway's image holds no torch"),
        ("services/kv_transfer/directory.py", "import duomo.engine.runner\n", "The directory and the model's description hold no torch"),
        ("services/decode/policy.py", "import duomo.wire.codec\n", "Policies decide and do nothing else"),
    ],
)
def test_the_contracts_catch_a_planted_import(tmp_path: Path, path: str, text: str, broken: str | None) -> None:
    """import-linter on a small copy of the tree: indirect imports count, and the shelf has no __init__.py."""
    linter = Path(sys.executable).parent / "lint-imports"
    for name, content in CONTRACT_FILES.items():
        plant(tmp_path, name, content)
        plant(tmp_path, str(PurePosixPath(name).parent / "__init__.py"), "")
    (tmp_path / "services" / "__init__.py").unlink()
    plant(tmp_path, "duomo/engine/runner.py", "import torch\n")
    plant(tmp_path, "duomo/wire/codec.py", "import asyncio\n")
    plant(tmp_path, path, text)
    (tmp_path / ".importlinter").write_text((ROOT / ".importlinter").read_text())
    result = subprocess.run(
        [sys.executable, "-S", str(linter), "--no-cache"],  # -S: an editable installation of this tree stays out
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{tmp_path / 'kernels'}:{sysconfig.get_path('purelib')}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = re.findall(r"^(.+) BROKEN$", result.stdout, re.M)
    assert found == ([broken] if broken else []), result.stdout + result.stderr
    assert (result.returncode != 0) is (broken is not None)
