"""Owns `duomo replica`: one process of the system without Ray, from its signals to its end. Knows no request."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine

from duomo.config import DuomoConfig
from duomo.engine.card_shares import POOLS
from duomo.engine.settle import settle
from duomo.errors import ConfigError
from services.cli_serve import INTERRUPTED, check_port
from services.kv_transfer.ending import REPLICA_LIMIT_S, end_tasks
from services.kv_transfer.started_heap import freeze_started

INTERRUPT_WAIT_S = 2.0
END_LIMIT_S = REPLICA_LIMIT_S + 30.0  # from the end of a drain: more than all steps, for what is between them
EXIT_LIMIT_S = 15.0  # the interpreter's own, once everything of ours is closed

Run = Callable[[DuomoConfig, str, asyncio.Event], Coroutine[object, object, None]]

log = logging.getLogger(__name__)


def leave_within(limit_s: float) -> None:
    """End this process by force after limit_s, with every thread's stack on stderr, whatever it is in by then. The last call counts.

    The last resort: each step of an end has a limit of its own (ending.py). It runs outside Python, which a library may not give back.
    """
    faulthandler.dump_traceback_later(limit_s, exit=True)


async def interrupted_before(ready: Coroutine[object, object, None], serving: asyncio.Task[None], stop: asyncio.Event) -> bool:
    """Whether `stop` was set before `ready` returned: then `serving` has been cancelled, and has had INTERRUPT_WAIT_S to close all.

    Returns as soon as it is ready, or has ended by itself.
    """
    waits = (asyncio.create_task(ready), asyncio.create_task(stop.wait()))
    try:
        await asyncio.wait((serving, *waits), return_when=asyncio.FIRST_COMPLETED)
        is_interrupted = stop.is_set() and not serving.done() and not waits[0].done()
    finally:
        await end_tasks(waits)
    if is_interrupted:
        serving.cancel()
        await asyncio.wait((serving,), timeout=INTERRUPT_WAIT_S)
    return is_interrupted


def _asked_by_signal(drain_s: float) -> asyncio.Event:
    """Set by SIGINT and SIGTERM; from the first one on this process has drain_s and END_LIMIT_S."""
    stop = asyncio.Event()

    def ask() -> None:
        if not stop.is_set():
            leave_within(drain_s + END_LIMIT_S)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask)
    return stop


def _run_of(role: str, config: DuomoConfig) -> Run:
    """What serves in this role until its event is set; imported here, so that a gateway needs no torch. Raises ConfigError."""
    if role == "router":
        check_port(config)
        from services.router.service import serve_gateway as run
    elif role == "engine":
        from services.colocated import run_replica as run
    elif config.layout == "colocated" and role in ("prefill", "decode"):
        raise ConfigError(f"layout is colocated, where one engine is prefill and decode: run `duomo replica engine`, not {role}")
    elif role == "prefill":
        from services.prefill.service import run_replica as run
    elif role == "decode":
        from services.decode.replica import run_replica as run
    else:
        raise ConfigError(f"ROLE must be prefill, decode, engine or router, not {role!r}")
    return run


def run_one(config: DuomoConfig, role: str, replica_id: str) -> int:
    """One process of the system without Ray, until SIGINT or SIGTERM: it drains, unregisters and ends."""
    if not config.redis.url:
        raise ConfigError("redis.url (DUOMO_REDIS_URL): a replica on its own needs the Redis server of its system")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; why: services/app.py
    why, fingerprint = "", ""
    if role != "router" and config.layout == "auto":  # the role says it
        config = config.model_copy(update={"layout": "colocated" if role == "engine" else "split"})
    if role != "router":  # a gateway needs no card, and works beside replicas of any
        settled = settle(config, own=next((pool for pool in POOLS if pool == role), None))
        config, why, fingerprint = settled.config, settled.why, settled.model.fingerprint
    run = _run_of(role, config)
    from duomo.telemetry import logging as telemetry_logging

    telemetry_logging.configure(role, replica_id)
    if why:
        log.info("%s", why)

    async def until_signalled() -> None:
        stop = _asked_by_signal(config.gateway.request_deadline_s)
        if config.layout != "auto" and fingerprint:
            from services.neighbours import refuse_mixed

            await refuse_mixed(config.redis, config.layout, fingerprint, replica_id)
        serving = asyncio.create_task(run(config, replica_id, stop))
        if role != "router":
            from services.kv_transfer.registration import until_registered

            registered = until_registered(config.redis, f"{replica_id}.prefill" if role == "engine" else replica_id)
            if await interrupted_before(registered, serving, stop):
                log.warning("asked to stop before it was ready: ending at once")
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(INTERRUPTED)  # a thread that loads or compiles hears of nothing for minutes, and would be waited for
            freeze_started()
        try:
            await serving
        finally:
            if stop.is_set():
                leave_within(EXIT_LIMIT_S)

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(until_signalled())
    return 0
