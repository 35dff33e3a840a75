"""Owns the start of both workers over one engine on a GPU, from a configuration. Knows no request. Imported where there is a GPU alone.

The thread that starts them is the one that computes with them: libraries keep their plans for the thread that made them.
"""

from __future__ import annotations

from dataclasses import dataclass

from duomo.config import DuomoConfig
from duomo.engine.gpu_engine import GpuEngine
from duomo.engine.gpu_start import planned, start_gpu_engine
from duomo.engine.startup import Startup
from duomo.models.config import served_config
from services.decode.gpu_worker import GpuDecodeWorker
from services.prefill.gpu_worker import GpuPrefillWorker
from services.prefill.worker import WorkerSizes, group_bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuWorkers:
    """config: with the planned number of blocks. The engine's to be closed by whoever started it: engine.compilations.close()."""

    prefill: GpuPrefillWorker
    decode: GpuDecodeWorker
    config: DuomoConfig
    engine: GpuEngine


def start_gpu_workers(config: DuomoConfig, startup: Startup) -> GpuWorkers:
    """Load, plan, capture; for minutes. Raises ConfigError with figures where the card is too small, ModelError for a bad folder."""
    # refuses before minutes of loading
    group_bounds(served_config(config.model).num_layers, config.model.units, config.prefill.units_per_group)
    return gpu_workers(start_gpu_engine(config, startup), config)


def gpu_workers(engine: GpuEngine, config: DuomoConfig) -> GpuWorkers:
    """Both workers over an engine that has started."""
    settled = planned(config, engine.plan)
    return GpuWorkers(
        prefill=GpuPrefillWorker(engine, WorkerSizes.of(settled), config.delays),
        decode=GpuDecodeWorker(engine, config.delays.decode_step_s),
        config=settled,
        engine=engine,
    )
