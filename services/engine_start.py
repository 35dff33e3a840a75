"""Owns a replica's wait for its GPU engine: started in the step thread, its phases shown, logged, traced. Knows no service or device.

Light to import: what needs CUDA is imported by the step thread, as the first phase.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from duomo.config import DuomoConfig
from duomo.engine.memory_plan import EnginePart
from duomo.engine.startup import StartPhase, Startup
from duomo.telemetry.tracing import Tracing
from services.kv_transfer.memory import Allocate, PageLocks, Region
from services.kv_transfer.step_thread import StepThread
from services.start_board import StartBoard

if TYPE_CHECKING:  # a CPU serves without Triton
    from duomo.engine.gpu_engine import GpuEngine

log = logging.getLogger(__name__)


async def engine_in(thread: StepThread, spans: Tracing, config: DuomoConfig, part: EnginePart) -> GpuEngine:
    """Whoever asks closes the engine's `compilations`. Raises ConfigError and ModelError naming what is wrong."""
    board = StartBoard(config.run_dir, "engine" if part == "both" else part)
    startup, started_s = Startup(_log_phase, board.show), time.monotonic()
    try:
        return await thread.run("step", _start, config, startup, part)
    finally:
        board.close()
        record_start(spans, startup, started_s)


def _start(config: DuomoConfig, startup: Startup, part: EnginePart) -> GpuEngine:
    """In the step thread: who captures and plans is who runs."""
    with startup.phase("import"):
        from duomo.engine.gpu_start import start_gpu_engine  # Triton and all kernels
    return start_gpu_engine(config, startup, part)


def _log_phase(phase: StartPhase) -> None:
    log.info("engine start: %s took %.1f s", phase.name, phase.duration_s)


def record_start(spans: Tracing, startup: Startup, started_s: float) -> None:
    """engine.start and its phases, also of a start that failed."""
    whole = spans.start_span("engine.start", start_s=started_s)
    for phase in startup.phases:
        spans.record_span("engine.phase", whole.traceparent, phase.started_s, phase.ended_s, {"duomo.phase": phase.name})
    whole.end()


def ring_memory(config: DuomoConfig) -> Allocate:
    """What rings and send slots are made of: the card's memory, where KV lies in it and kv_transfer.memory does not say host."""
    if not _is_on_card(config):
        return Region
    import torch

    from services.kv_transfer.device_memory import DeviceRegion

    return partial(DeviceRegion, device=torch.device("cuda", 0))


def ring_memory_name(config: DuomoConfig) -> str:
    """For people: where rings and send slots lie."""
    return "the card's memory" if _is_on_card(config) else "the host's memory"


def _is_on_card(config: DuomoConfig) -> bool:
    return config.model.device == "cuda" and config.kv_transfer.memory == "device"


def page_locks(config: DuomoConfig) -> PageLocks | None:
    """For memory of the host that peers write and the card reads; None where there is none."""
    if config.model.device != "cuda" or _is_on_card(config):
        return None
    import torch

    from duomo.engine.gpu_page_locks import GpuPageLocks

    return GpuPageLocks(torch.device("cuda", 0))
