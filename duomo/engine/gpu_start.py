"""Owns the start of an engine on this process' first card from a configuration: whose weights, which part, what share. Knows no service.

The thread that starts it is the one that computes with it: libraries keep their plans for the thread that made them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from duomo.config import DuomoConfig, changed
from duomo.engine.card_shares import gpu_share, share_of
from duomo.engine.device import resolve_device
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.memory_plan import DeviceBytes, EnginePart, MemoryPlan
from duomo.engine.settle import memory_limits
from duomo.engine.startup import Startup
from duomo.models.config import ModelConfig, served_config
from duomo.models.gpu_load import load_gpu_weights
from duomo.models.gpu_random import random_gpu_weights
from duomo.models.gpu_weights import GpuWeights


def start_gpu_engine(config: DuomoConfig, startup: Startup, part: EnginePart = "both") -> GpuEngine:
    """Load, plan, capture; for minutes. Raises ConfigError with figures where the card is too small, ModelError for a bad folder."""
    resolve_device("cuda")  # says in words where Ray or the environment hides the card
    model = served_config(config.model)
    device = torch.device("cuda", 0)
    share = 1.0 if part == "both" else gpu_share(config, part) or 1.0
    start = EngineStart(
        config=model,
        load=_loader(config, model, device, startup),
        limits=memory_limits(config, model, part),
        device=device,
        is_deterministic=config.deterministic,
        kv_dtype=config.kv_transfer.kv_dtype,
        memory=None if share == 1.0 else share_of(_whole(device), share),
        is_shared=share < 1.0,
        shows_progress=sys.stderr.isatty(),
    )
    return start_engine(start, startup)


def planned(config: DuomoConfig, plan: MemoryPlan, part: EnginePart = "both") -> DuomoConfig:
    """The configuration with what was planned: blocks of the pool that this part has."""
    pool = "prefill" if part == "prefill" else "decode"
    changes: dict[str, object] = {f"{pool}.num_blocks": plan.num_blocks, "model.block_tokens": plan.block_tokens}
    return changed(config, changes, f"{plan.num_blocks} KV blocks are planned")


def _whole(device: torch.device) -> DeviceBytes:
    free, total = torch.cuda.mem_get_info(device)
    return DeviceBytes(total=total, free=free)


def _loader(config: DuomoConfig, model: ModelConfig, device: torch.device, startup: Startup) -> Callable[[], GpuWeights]:
    section = config.model
    quantise = section.quantize or None
    if section.random_weights:
        return partial(random_gpu_weights, model, device=device, quantise=quantise, seed=section.random_seed)
    shows_bar = sys.stderr.isatty()
    return partial(
        load_gpu_weights, section.path, device=device, quantise=quantise, progress=shows_bar, count=None if shows_bar else startup.count
    )
