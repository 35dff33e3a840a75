"""Owns the Serve application: binds router, prefill, decode and directory, starts and stops Ray around it. Knows no request.

The only file that knows all four services' deployments; in the layout colocated one of them, engine, is prefill and decode. Ray places,
counts, health-checks and restarts their replicas; no request, token or byte of KV passes through Ray (docs/decisions/0003-ingress.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import ray
from ray import serve
from ray.serve._private.common import DeploymentID  # the controller's scaling call has no public Python door in 2.60
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from duomo.config import DuomoConfig
from duomo.engine.card_shares import refuse_scaled
from duomo.errors import ConfigError, EngineError
from services.decode.deployment import DecodeDeployment
from services.kv_transfer.deployment import DirectoryDeployment
from services.kv_transfer.registration import until_registered
from services.kv_transfer.service_thread import ServiceThread
from services.prefill.deployment import PrefillDeployment
from services.router.deployment import RouterDeployment
from services.start_board import StartWatch

APP_NAME = "duomo"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
# Every replica asks for almost nothing: Serve's default of one CPU each would never start four on two cores.
CPUS_PER_REPLICA = 0.01
OBJECT_STORE_BYTES = 80 * 1024 * 1024  # nothing large goes through it; Ray refuses less than 75 MiB
# Threads that spin at the end of a parallel region take the core from the thread they wait for: a step of two replicas with two threads
# each, on two busy cores, took 425 ms with libgomp's default and 13 ms so. Read when torch is loaded.
WAIT_POLICY = "PASSIVE"
DRAIN_ON_STOP_S = 20.0
SLOW_PLACEMENT_S = 8
RAISED = re.compile(r"^[ \t]*([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Cancelled)\b.*)$", re.MULTILINE)
ScalablePool = Literal["prefill", "decode"]

log = logging.getLogger(__name__)


class EngineDeployment:
    """One process that is both pools (services/colocated.py). The constructor returns when both are warm and registered."""

    def __init__(self, config_json: str) -> None:
        # Here, not on top: whoever binds the application imports this file, and needs no torch.
        from duomo.telemetry import logging as telemetry_logging
        from services.colocated import run_replica

        config = DuomoConfig.model_validate_json(config_json)
        replica_id = f"engine-{serve.get_replica_context().replica_tag[:8]}"
        telemetry_logging.configure("engine", replica_id)

        async def run(stop: asyncio.Event) -> None:
            await run_replica(config, replica_id, stop)

        async def ready() -> None:
            for pool in ("decode", "prefill"):
                await until_registered(config.redis, f"{replica_id}.{pool}")

        self._drain_s = config.gateway.request_deadline_s
        self._thread = ServiceThread(replica_id, run, ready)
        self._thread.start(config.ray.start_timeout_s)

    async def check_health(self) -> None:
        """Serve's health check: raises, and so has this replica replaced, when either service has ended or stands still."""
        self._thread.check()

    async def __del__(self) -> None:
        """Serve's shutdown hook (it has no other): take no new request, finish the live ones, unregister."""
        await self._thread.stop(self._drain_s)


def pool_deployments(config: DuomoConfig) -> dict[str, tuple[type, int]]:
    """The deployments that compute, by name: class and replicas."""
    if config.layout == "colocated":
        return {"engine": (EngineDeployment, 1)}
    return {"prefill": (PrefillDeployment, config.prefill.replicas), "decode": (DecodeDeployment, config.decode.replicas)}


def build_application(config: DuomoConfig) -> serve.Application:
    """All deployments, bound. The router is the ingress by name only: it listens itself."""
    told = config.model_dump_json()
    directory = _deployed(DirectoryDeployment, "directory", 1, config).bind(told)
    pools = [_deployed(one, name, replicas, config).bind(told) for name, (one, replicas) in pool_deployments(config).items()]
    return _deployed(RouterDeployment, "router", 1, config).bind(told, directory, *pools)


def _deployed(service: type, name: str, replicas: int, config: DuomoConfig) -> serve.Deployment:
    actor: dict[str, object] = {"num_cpus": CPUS_PER_REPLICA}
    if gpus := _gpus_of(name, config):
        actor["num_gpus"] = gpus  # without any Ray hides the cards from the replica (CUDA_VISIBLE_DEVICES is empty there)
    if config.ray.pin_by_resource:
        actor["resources"] = {f"duomo_{name}": 0.001}
    return serve.deployment(
        name=name,
        num_replicas=replicas,
        ray_actor_options=actor,
        health_check_period_s=2.0,
        health_check_timeout_s=20.0,
        graceful_shutdown_timeout_s=config.gateway.request_deadline_s + 10,  # Serve kills what has not drained by then
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,  # a start that fails fails: its exception is shown at once
        logging_config=QUIET,
    )(service)


def _gpus_of(name: str, config: DuomoConfig) -> float:
    """Cards that a replica of this deployment takes, as Ray counts: two that share one take half each, whatever their shares of memory."""
    if config.model.device != "cuda" or name not in pool_deployments(config):
        return 0
    is_shared = name != "engine" and any((pool.gpu_share or 1) < 1 for pool in (config.prefill, config.decode))
    return 0.5 if is_shared else 1


def _gpus(config: DuomoConfig) -> int:
    """Cards that all replicas take."""
    return math.ceil(sum(replicas * _gpus_of(name, config) for name, (_, replicas) in pool_deployments(config).items()))


class RaySystem:
    """One Duomo on Ray. start() and stop() belong together; stop() may follow a start() that failed or was interrupted.

    Owns every process below this one: stop() ends them all, Ray's own included, unless an existing cluster is used.
    """

    def __init__(self, config: DuomoConfig, run_dir: Path, say: Callable[[str], None]) -> None:
        self._config = config
        self._run_dir = run_dir
        self._say = say
        self._is_local = config.ray.address == "local"
        self._wanted = {name: count for name, (_, count) in pool_deployments(config).items()}
        self._not_ours = set(psutil.Process().children(recursive=True))  # the embedded Redis: others end it, later

    def start(self) -> None:
        """Start Ray and deploy; returns when all replicas run. Raises EngineError or ConfigError with the replica's own words."""
        began_s = time.monotonic()
        deadline_s = began_s + self._config.ray.start_timeout_s
        self._start_ray()
        self._say(f"ray is up ({time.monotonic() - began_s:.1f} s)")
        self._check_placeable()
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        self._say(f"serve is up ({time.monotonic() - began_s:.1f} s)")
        target = serve.RunTarget(target=build_application(self._config), name=APP_NAME, route_prefix="/", external_scaler_enabled=True)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        self._wait_until_running(began_s, deadline_s)

    def scale(self, pool: ScalablePool, replicas: int) -> None:
        """Set a pool's number of replicas. Replicas that go drain first: they finish their streams; the cards of theirs may be counted on.

        Raises ConfigError where the layout has no such pool, or no card is left for them.
        """
        if pool not in pool_deployments(self._config):
            raise ConfigError(f"layout is colocated: {pool} is a part of the one engine, which is not scaled")
        wanted = self._wanted | {pool: replicas}
        if self._config.model.device == "cuda":
            refuse_scaled(self._config, wanted, self._num_cards())
        client = serve.context._get_global_client()
        assert client is not None, "scale() before start()"
        controller = client._controller
        ray.get(controller.update_deployment_replicas.remote(DeploymentID(name=pool, app_name=APP_NAME), replicas), timeout=30)
        self._wanted = wanted

    def replicas(self) -> dict[str, dict[str, int]]:
        """How many replicas of each deployment are in which state: {"decode": {"RUNNING": 2}}."""
        return {
            name: {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}
            for name, deployment in self._overview().deployments.items()
        }

    def failure(self) -> str | None:
        """Why the application cannot serve, in Serve's words, or None while it runs or is being repaired."""
        overview = self._overview()
        return _worst_message(overview) if overview.status == ApplicationStatus.DEPLOY_FAILED else None

    def stop(self, urgent: threading.Event) -> None:
        """Drain for up to DRAIN_ON_STOP_S or until `urgent`, stop Serve and Ray, and end what is left of their processes."""
        if not ray.is_initialized():  # interrupted half started: nothing to drain, and a raylet that still starts its agents
            if self._is_local:
                _kill_tree(self._not_ours)
            return
        processes = _descendants(self._not_ours) if self._is_local else []
        if not urgent.is_set():
            self._stop_serve(urgent)
        with contextlib.suppress(OSError, RuntimeError):  # a node half started when it was interrupted
            ray.shutdown()
        _end_all(processes)

    def _start_ray(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        if not self._is_local:
            ray.init(address=self._config.ray.address, log_to_driver=False, logging_level=logging.ERROR)
            return
        os.environ.update(
            {
                "RAY_worker_niceness": "0",  # Ray's default of 15 starves replicas beside any other load
                "RAY_USAGE_STATS_ENABLED": "0",
                "OMP_WAIT_POLICY": WAIT_POLICY,
                "RAY_SERVE_LOG_TO_STDERR": "0",
                "SERVE_SLOW_STARTUP_WARNING_S": str(SLOW_PLACEMENT_S),
                "PYTHONPATH": os.pathsep.join(_import_roots()),
            }
        )
        temp_dir = self._run_dir / "ray"
        try:
            ray.init(
                address="local",
                num_cpus=1,  # also the number of workers started ahead, 60 MB each
                num_gpus=_gpus(self._config),  # named, not searched for: duomo/engine/device.py has looked already
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(temp_dir.resolve()),
            )
        except OSError as error:
            raise ConfigError(f"run_dir: Ray cannot use {temp_dir}: {error}") from error

    def _num_cards(self) -> float:
        """Of all nodes, whoever uses them."""
        offered: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray ships no type for it
        return offered.get("GPU", 0)

    def _check_placeable(self) -> None:
        offered: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray ships no type for it
        if not self._is_local and self._num_cards() < _gpus(self._config):
            found = f"the Ray cluster offers {self._num_cards():g} GPUs, and {_gpus(self._config)} are needed"
            raise ConfigError(f"model.device (--device) is cuda, but {found}")
        if not self._config.ray.pin_by_resource:
            return
        for name in ("directory", *pool_deployments(self._config), "router"):
            if f"duomo_{name}" not in offered:
                raise ConfigError(
                    f"ray.pin_by_resource is set, but no node offers the resource duomo_{name} "
                    f"(start one with `ray start --resources='{{\"duomo_{name}\": 1}}'`)"
                )

    def _wait_until_running(self, began_s: float, deadline_s: float) -> None:
        running: set[str] = set()
        starting = StartWatch(self._run_dir, lambda line: self._say(f"{line} ({time.monotonic() - began_s:.1f} s)"))
        while True:
            starting.look()
            overview = self._overview()
            for name, deployment in overview.deployments.items():
                if deployment.status == "HEALTHY" and name not in running:
                    running.add(name)
                    self._say(f"{name} runs ({time.monotonic() - began_s:.1f} s)")
            if overview.status == ApplicationStatus.RUNNING:
                return
            if overview.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise EngineError(_worst_message(overview), code="start_failed", phase="start")
            if time.monotonic() > deadline_s:
                missing = ", ".join(sorted({"router", "directory", *pool_deployments(self._config)} - running))
                limit = f"ray.start_timeout_s ({self._config.ray.start_timeout_s:.0f} s)"
                raise EngineError(
                    f"{missing} not running after {limit}: {_worst_message(overview)}",
                    code="start_timeout",
                    phase="start",
                )
            time.sleep(0.1)

    def _overview(self) -> ApplicationStatusOverview:
        return serve.status().applications[APP_NAME]

    def _stop_serve(self, urgent: threading.Event) -> None:
        """Deleting drains every replica and has no time limit that callers choose, so it runs in a thread that may be left behind."""

        def shut_down() -> None:
            try:
                serve.delete(APP_NAME)
            except (RuntimeError, ray.exceptions.RayError) as error:  # the controller is gone already: nothing is left to stop
                log.info("serve was down before it was stopped: %s", error)

        thread = threading.Thread(target=shut_down, name="serve-delete", daemon=True)
        thread.start()
        end_s = time.monotonic() + DRAIN_ON_STOP_S
        while thread.is_alive() and not urgent.is_set() and time.monotonic() < end_s:
            thread.join(0.1)


def _worst_message(overview: ApplicationStatusOverview) -> str:
    """The message of the deployments that do not run, shortened to the replica's own exception."""
    messages = [f"{name}: {_last_words(d.message)}" for name, d in overview.deployments.items() if d.status != "HEALTHY" and d.message]
    return "; ".join(messages) or _last_words(overview.message) or f"Serve says {overview.status.value}"


def _last_words(message: str) -> str:
    """The last exception of a traceback, as its replica raised it; messages without one whole, on one line."""
    raised: list[str] = RAISED.findall(message)
    if "Traceback" not in message or not raised:
        return " ".join(message.split())
    return raised[-1].removeprefix("duomo.errors.").strip()


def _import_roots() -> list[str]:
    """Folders that make services, duomo and duomo_kernels importable in Ray's workers, then what this process was given."""
    root = Path(__file__).resolve().parents[1]
    kernels = root / "kernels"
    ours = [str(root), *([str(kernels)] if kernels.is_dir() else [])]
    return ours + [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry not in ours]


def _descendants(not_ours: set[psutil.Process]) -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if one not in not_ours]


def _kill_tree(not_ours: set[psutil.Process]) -> None:
    """Kill everything below this process at once. Stopped first, so that none starts another between the look and the kill."""
    stopped: set[psutil.Process] = set()
    while new := [one for one in _descendants(not_ours) if one not in stopped]:
        for process in new:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        stopped.update(new)
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stopped, timeout=3)


def _end_all(processes: list[psutil.Process]) -> None:
    """Wait for the processes that this system started; terminate, then kill, those that stay."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=3)
    for process in alive:
        print(f"duomo: killing {process.pid}, which did not end", file=sys.stderr)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
