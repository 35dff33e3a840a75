"""Owns `duomo serve`: the folder of a run, start-up with its phases, signals and a clean end. Knows no request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from duomo.config import DuomoConfig
from duomo.engine.settle import settle
from duomo.errors import ConfigError, EngineError, ModelError
from services.admin import SOCKET_NAME, AdminCommand, AdminSocket, Replicas, default_run_dir, is_alive

if TYPE_CHECKING:
    from services.app import RaySystem

WATCH_PERIOD_S = 2.0
MARKER = "run.json"
INTERRUPTED = 130


class StopSignals:
    """SIGINT and SIGTERM: during start-up they interrupt it; later they set `stopped`; a repeated one means: do not drain.

    Python drops an exception raised inside a hook of its own (a callback at fork, a finaliser), so the interrupt alone may get lost:
    every phase of a start calls check().
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.urgent = threading.Event()
        self.is_starting = True
        self.install()

    def install(self) -> None:
        """Again after ray.init(), which puts its own SIGTERM handler in place."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped.is_set():
            self.urgent.set()
        self.stopped.set()
        if self.is_starting:
            self.is_starting = False
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt where a signal has asked for the end."""
        if self.stopped.is_set():
            raise KeyboardInterrupt


def serve(config: DuomoConfig) -> int:
    """Start everything, print the URL once the system is ready, serve until SIGINT or SIGTERM, leave nothing behind."""
    code = _serve(config)
    if code == INTERRUPTED:  # a Ray half started may crash in its destructors; nothing of ours is left to end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _serve(config: DuomoConfig) -> int:
    check_port(config)
    warning = check_doors(config)
    note = check_model(config)
    settled = settle(config)
    config = settled.config
    signals = StopSignals()
    say = _Phases()
    say(settled.why)
    for line in settled.memory_lines():
        say(f"memory: {line}")
    for told in (note, warning):
        if told:
            say(told)
    with contextlib.ExitStack() as ends:
        try:
            run_dir = ends.enter_context(claimed_run_dir(config))
            config = config.model_copy(update={"run_dir": run_dir})
            config = ends.enter_context(with_redis(config, run_dir, say))
            if settled.config.redis.url and config.layout != "auto":
                from services.neighbours import refuse_mixed

                asyncio.run(refuse_mixed(config.redis, config.layout, settled.model.fingerprint))
            try:
                system = _start(config, run_dir, say, signals, ends)
            except BaseException:  # raised again: nothing was served yet, so nothing needs to drain
                signals.urgent.set()
                raise
            signals.is_starting = False
            _announce(config, say)
            return _watch(system, signals, say)
        except KeyboardInterrupt:
            say("interrupted")
            return INTERRUPTED
        finally:
            signals.is_starting = False
            say("stopping")


def _start(config: DuomoConfig, run_dir: Path, say: _Phases, signals: StopSignals, ends: contextlib.ExitStack) -> RaySystem:
    from services.app import RaySystem

    def next_phase(phase: str) -> None:
        say(phase)
        signals.install()  # ray.init() has put its own SIGTERM handler in place, and the longest wait is still to come
        signals.check()

    next_phase("ray is imported")
    system = RaySystem(config, run_dir, next_phase)
    ends.callback(system.stop, signals.urgent)
    try:
        system.start()
    finally:
        signals.install()
    ends.enter_context(admin_socket(run_dir / SOCKET_NAME, system))
    wait_until_ready(config, config.ray.start_timeout_s, signals.check)
    signals.check()
    return system


def _watch(system: RaySystem, signals: StopSignals, say: Callable[[str], None]) -> int:
    """Wait for the end, saying which replicas come and go. Serve repairs what fails; only an application that it gave up ends us."""
    seen = system.replicas()
    while not signals.stopped.wait(WATCH_PERIOD_S):
        replicas = system.replicas()
        for name in replicas:
            if replicas[name] != seen.get(name):
                say(f"{name}: {describe(replicas[name])}")
        seen = replicas
        failure = system.failure()
        if failure is not None:
            raise EngineError(failure, phase="start")
    return 0


def describe(states: dict[str, int]) -> str:
    """{"RUNNING": 1, "STOPPING": 1} in words."""
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()) if count) or "none"


class _Phases:
    """Prints the phases of a start with the seconds since it began, on stderr."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def __call__(self, phase: str) -> None:
        print(f"duomo {time.monotonic() - self._began_s:6.1f} s  {phase}", file=sys.stderr, flush=True)


def _announce(config: DuomoConfig, say: Callable[[str], None]) -> None:
    url = base_url(config)
    body = json.dumps({"model": config.model.served_name, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64})
    say("ready")
    print(f"Duomo serves {config.model.served_name} at {url}")
    print(f"Try:  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)


def base_url(config: DuomoConfig) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.gateway.host, config.gateway.host)
    return f"{'https' if config.gateway.ssl_certfile else 'http'}://{host}:{config.gateway.port}"


def check_port(config: DuomoConfig) -> None:
    """Raise ConfigError naming the option while nothing has been started yet."""
    host, port = config.gateway.host, config.gateway.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the gateway does: TIME_WAIT is no obstacle
            probe.bind(address)
    except PermissionError as error:
        raise ConfigError(f"--port {port} (gateway.port): this user may not listen there; name one above 1023") from error
    except OSError as error:
        raise ConfigError(f"--port {port} (gateway.port) on --host {host} cannot be used: {error.strerror}; name another one") from error


def check_doors(config: DuomoConfig) -> str:
    """Raise ConfigError for keys or TLS files that the gateway could not use, before anything is started.

    Returns what to warn of, "" for nothing: strangers who reach it and are asked for no key.
    """
    from services.router.keys import Keys, open_door
    from services.router.tls import tls_context

    Keys(config.gateway)
    tls_context(config.gateway)
    return open_door(config.gateway)


def check_model(config: DuomoConfig) -> str:
    """Raise ModelError or ConfigError for a folder that the gateway could not serve, before anything is started. Weights: the replicas.

    Returns what the operator should know of its tokenizer, "" for nothing.
    """
    from services.router.model_card import read_model_card
    from services.router.text import ModelText

    path = config.model.path
    if not config.model.random_weights and not any(path.glob("*.safetensors")):
        raise ModelError(f"{path} holds no weights (*.safetensors); on a GPU --random-weights draws some")
    return ModelText.of(config.model, read_model_card(config.model).vocab_size, config.gateway).note


def wait_until_ready(config: DuomoConfig, timeout_s: float, check: Callable[[], None]) -> None:
    """Wait for 200 on /health/ready: prefill and decode registered, connected and warm. `check` raises to end the wait.

    Where the gateway asks for a client's certificate it hangs up on us, who bring none: that, once all replicas are registered, is enough.
    """
    url = base_url(config) + "/health/ready"
    trusting = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())  # it is ourselves, and is told no secret
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), trusting)
    end_s = time.monotonic() + timeout_s
    answer = "no answer"
    while time.monotonic() < end_s:
        check()
        try:
            with opener.open(url, timeout=5):
                return
        except urllib.error.HTTPError as error:
            answer = f"{error.code} {error.read(500).decode(errors='replace')}"
        except OSError as error:
            answer = str(error)
            reason = getattr(error, "reason", error)
            if config.gateway.ssl_ca_certs is not None and isinstance(reason, ConnectionResetError | ssl.SSLError):
                return
        time.sleep(0.05)
    raise EngineError(f"{url} was not ready within ray.start_timeout_s ({timeout_s:.0f} s): {answer}", code="start_timeout", phase="start")


@contextlib.contextmanager
def claimed_run_dir(config: DuomoConfig) -> Iterator[Path]:
    """This run's own folder, emptied and removed at the end. What a killed run left behind is cleared first."""
    path = config.run_dir or default_run_dir(config.gateway.port)
    is_new = not path.exists()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            raise ConfigError(f"run_dir {path} belongs to somebody else; name another one by --run-dir")
        if is_alive(path / SOCKET_NAME):
            raise ConfigError(f"run_dir {path} is in use by a running duomo; name another one by --run-dir, or another --port")
        left = list(path.iterdir())
        if left and not (path / MARKER).exists():
            raise ConfigError(f"run_dir {path} holds files of something else; name an empty folder by --run-dir")
        if left:
            end_processes_of(path.resolve())
        _empty(path)
        (path / MARKER).write_text(json.dumps({"pid": os.getpid(), "port": config.gateway.port}))
    except OSError as error:
        raise ConfigError(f"run_dir {path} cannot be used: {error}") from error
    try:
        yield path.resolve()
    finally:
        _empty(path)
        if is_new:
            with contextlib.suppress(OSError):
                path.rmdir()


def end_processes_of(run_dir: Path) -> None:
    """Kill what a killed run left: Ray's agents outlive a driver that gets SIGKILL. Their open log files tell them."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # not ours to look at, or gone meanwhile
            if any(Path(file.path).is_relative_to(run_dir) for file in process.open_files()):
                process.kill()


def _empty(folder: Path) -> None:
    """The marker goes last: whoever is interrupted here leaves a folder that the next run still knows for its own."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == MARKER):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def with_redis(config: DuomoConfig, run_dir: Path, say: Callable[[str], None]) -> Iterator[DuomoConfig]:
    """The configuration with a Redis URL: the named server's, or an embedded one's that ends with this context."""
    if config.redis.url:
        yield config
        return
    if config.ray.address != "local":
        raise ConfigError("redis.url (DUOMO_REDIS_URL): on an existing Ray cluster name a Redis server that every node reaches")
    from services.kv_transfer.embedded_redis import EmbeddedRedis

    server = EmbeddedRedis(run_dir)
    server.start()
    say("redis is up")
    try:
        yield config.model_copy(update={"redis": config.redis.model_copy(update={"url": server.url})})
    finally:
        server.stop()


@contextlib.contextmanager
def admin_socket(path: Path, system: RaySystem) -> Iterator[None]:
    def run(command: AdminCommand) -> Replicas:
        if command.command == "scale":
            assert command.pool is not None and command.replicas is not None
            system.scale(command.pool, command.replicas)
        return system.replicas()

    door = AdminSocket(path, run)
    door.start()
    try:
        yield
    finally:
        door.close()
