"""Owns the start of both workers over one engine on a GPU, from a configuration. Knows no request. Imported where there is a GPU alone.

The thread that starts them is the one that computes with them: libraries keep their plans for the thread that made them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from duomo.config import DuomoConfig, changed
from duomo.engine.device import resolve_device
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.settle import memory_limits
from duomo.engine.startup import Startup
from duomo.models.config import ModelConfig, served_config
from duomo.models.gpu_load import load_gpu_weights
from duomo.models.gpu_random import random_gpu_weights
from duomo.models.gpu_weights import GpuWeights
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
    resolve_device("cuda")  # says in words where Ray or the environment hides the card
    model = served_config(config.model)
    group_bounds(model.num_layers, config.model.units, config.prefill.units_per_group)  # refuses before minutes of loading
    device = torch.device("cuda", 0)
    start = EngineStart(
        config=model,
        load=_loader(config, model, device, startup),
        limits=memory_limits(config, model),
        device=device,
        is_deterministic=config.deterministic,
        shows_progress=sys.stderr.isatty(),
    )
    return gpu_workers(start_engine(start, startup), config)


def gpu_workers(engine: GpuEngine, config: DuomoConfig) -> GpuWorkers:
    """Both workers over an engine that has started."""
    plan = engine.plan
    planned = changed(
        config, {"decode.num_blocks": plan.num_blocks, "model.block_tokens": plan.block_tokens}, f"{plan.num_blocks} KV blocks are planned"
    )
    return GpuWorkers(
        prefill=GpuPrefillWorker(engine, WorkerSizes.of(planned), config.delays),
        decode=GpuDecodeWorker(engine, config.delays.decode_step_s),
        config=planned,
        engine=engine,
    )


def _loader(config: DuomoConfig, model: ModelConfig, device: torch.device, startup: Startup) -> Callable[[], GpuWeights]:
    section = config.model
    quantise = section.quantize or None
    if section.random_weights:
        return partial(random_gpu_weights, model, device=device, quantise=quantise, seed=section.random_seed)
    shows_bar = sys.stderr.isatty()
    return partial(
        load_gpu_weights, section.path, device=device, quantise=quantise, progress=shows_bar, count=None if shows_bar else startup.count
    )
