"""Owns what a configuration becomes on this host: device, layout and block size named, and refusals before anything starts. Knows no torch.

    settled = settle(config)        # nothing is "auto" in settled.config; on a GPU settled.plan divides the card

A system is settled once, by whoever starts it (`duomo serve`, `duomo replica`) or looks at it (`duomo doctor`): a replica under Ray sees
only the cards that were set apart for it, the gateway none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from duomo.config import DuomoConfig, changed
from duomo.engine.card_shares import POOLS, Pool, gpu_share, refuse_crowded, share_of, shares
from duomo.engine.device import Card, Host, Pick, pick_device
from duomo.engine.memory_plan import GPU_BLOCK_TOKENS, DeviceBytes, EnginePart, MemoryLimits, MemoryPlan, plan_memory
from duomo.engine.wave_buckets import MAX_WAVE_PROMPTS
from duomo.errors import ConfigError, ModelError
from duomo.models.config import ModelConfig, refuse_on_cpu, served_config

GPU_SLOT_BYTES = 64 * 1024 * 1024  # a message costs the host the same however large: a quarter of 2,048 tokens of OLMoE or Qwen3-30B is one
GPU_RING_SLOTS, GPU_SEND_SLOTS = 10, 5  # a handle is granted half a ring: all messages of such a prompt, so that none waits for a step
GPU_PROGRESS_DELAY_US = 100  # nobody sees bytes land in a card's memory: they wait for the notification, and it for this thread
GPU_WRITE_THREADS = 1  # the card's own engines copy
COLOCATED_UNITS = 16  # layers that a decode step waits for at least: few. Nothing is sent group by group there, so groups may be many
SLOT_TRAILER_BYTES = 128  # at most, padding included: behind the payload of every slot
GPU_START_TIMEOUT_S = 900.0  # tens of gigabytes are read and kernels compiled; a CPU's default is for a small model


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """why: one line on device and layout. card, plan (by estimates): where a card was looked at; None on a CPU.

    prefill_plan: where prefill has an engine of its own; `plan` is decode's then. Of one replica `plan` alone, its own.
    """

    config: DuomoConfig
    model: ModelConfig
    why: str
    card: Card | None = None
    plan: MemoryPlan | None = None
    prefill_plan: MemoryPlan | None = None

    def memory_lines(self) -> list[str]:
        """The plan, or both, for people."""
        if self.plan is None:
            return []
        if self.prefill_plan is None:
            return self.plan.lines()
        return [f"{pool:<8}{line}" for pool, plan in (("prefill", self.prefill_plan), ("decode", self.plan)) for line in plan.lines()]


def settle(config: DuomoConfig, look: Callable[[], Host] | None = None, *, own: Pool | None = None) -> Settled:
    """own: of one replica that this process will be, with the card that it sees unless gpu_share says that another has a part of it.

    Raises ConfigError or ModelError naming what this host cannot do, with figures where memory is short.
    """
    model = served_config(config.model)
    pick = _pick(config, look)
    config = changed_for(config, pick, model.num_layers)
    why = f"{pick.why}; layout {config.layout}"
    if pick.device == "cpu":
        refuse_on_cpu(model)
        return Settled(config=config, model=model, why=why)
    _refuse_on_gpu(config, model)
    if config.layout == "split":
        return _settled_split(Settled(config=config, model=model, why=why, card=pick.card), pick.num_cards, own)
    limits = memory_limits(config, model)
    plan = None if pick.card is None else plan_memory(model, device_bytes(pick.card), limits)
    return Settled(config=config, model=model, why=why, card=pick.card, plan=plan)


def _settled_split(settled: Settled, num_cards: int | None, own: Pool | None) -> Settled:
    """Two engines, on a card each or on parts of one; each has its plan."""
    config = changed(settled.config, shares(settled.config, None if own else num_cards), settled.why)
    parts = {pool: gpu_share(config, pool) or 1.0 for pool in POOLS}
    way = "a card for each replica" if parts["decode"] == 1.0 else "; ".join(f"{pool}.gpu_share {parts[pool]:g}" for pool in POOLS)
    settled = replace(settled, config=config, why=f"{settled.why}: {way}")
    if settled.card is None:
        return settled
    device, starting = device_bytes(settled.card), POOLS if own is None else (own,)
    refuse_crowded(config, device, starting)
    plans: dict[Pool, MemoryPlan] = {}
    for pool in starting:
        try:
            plans[pool] = plan_memory(settled.model, share_of(device, parts[pool]), memory_limits(config, settled.model, pool))
        except ConfigError as error:
            raise ConfigError(f"{pool} with gpu_share {parts[pool]:g}: {error.detail}", code=error.code) from error
    return replace(settled, plan=plans[starting[-1]], prefill_plan=plans["prefill"] if own is None else None)


def changed_for(config: DuomoConfig, pick: Pick, num_layers: int) -> DuomoConfig:
    """Everything that follows from the device, named; what the operator named stays. Raises ConfigError with the device's reason."""
    is_gpu = pick.device == "cuda"
    changes: dict[str, object] = {"model.device": pick.device}
    if config.layout == "auto":
        changes["layout"] = "colocated" if is_gpu else "split"
    is_one_process = changes.get("layout", config.layout) == "colocated"
    if is_gpu and is_one_process and "units" not in config.model.model_fields_set:
        changes["model.units"] = min(COLOCATED_UNITS, num_layers)
    if is_gpu and "block_tokens" not in config.model.model_fields_set:
        changes["model.block_tokens"] = GPU_BLOCK_TOKENS
    if is_gpu and "slot_bytes" not in config.kv_transfer.model_fields_set:
        changes["kv_transfer.slot_bytes"] = GPU_SLOT_BYTES
    if is_gpu and "ring_slots" not in config.decode.model_fields_set:
        changes["decode.ring_slots"] = GPU_RING_SLOTS
    if is_gpu and "send_slots" not in config.prefill.model_fields_set:
        changes["prefill.send_slots"] = GPU_SEND_SLOTS
    if is_gpu and "progress_delay_us" not in config.kv_transfer.model_fields_set:
        changes["kv_transfer.progress_delay_us"] = GPU_PROGRESS_DELAY_US
    if is_gpu and "num_write_threads" not in config.kv_transfer.model_fields_set:
        changes["kv_transfer.num_write_threads"] = GPU_WRITE_THREADS
    if is_gpu and "start_timeout_s" not in config.ray.model_fields_set:
        changes["ray.start_timeout_s"] = GPU_START_TIMEOUT_S
    return changed(config, changes, pick.why)


def memory_limits(config: DuomoConfig, model: ModelConfig, part: EnginePart = "both") -> MemoryLimits:
    """What the memory plan must hold, by the configuration. A prompt longer than a wave goes alone, in chunks where it is longer yet."""
    longest = min(config.model.max_model_tokens or model.max_position_tokens, model.max_position_tokens)
    return MemoryLimits(
        max_batch=config.decode.max_batch,
        max_wave_tokens=config.prefill.max_wave_tokens,
        long_chunk_tokens=config.prefill.long_chunk_tokens,
        max_model_tokens=longest,
        block_tokens=config.model.block_tokens,
        gpu_memory_fraction=config.gpu_memory_fraction,
        quantise=config.model.quantize or None,
        part=part,
        handoff_bytes=handoff_bytes(config, part),
    )


def handoff_bytes(config: DuomoConfig, part: EnginePart) -> int:
    """Of the card's memory: prefill's send slots, or decode's landing rings, one for each prefill replica that the configuration names."""
    section = config.kv_transfer
    if part == "both" or section.memory == "host":
        return 0
    num_slots = config.prefill.send_slots if part == "prefill" else config.decode.ring_slots * config.prefill.replicas
    return num_slots * (section.slot_bytes + SLOT_TRAILER_BYTES)


def _refuse_on_gpu(config: DuomoConfig, model: ModelConfig) -> None:
    """Sizes that the kernels do not know, or that would break a promise: before anything is loaded."""
    block_tokens, prompts = config.model.block_tokens, config.prefill.max_wave_prompts
    if block_tokens & (block_tokens - 1):
        raise ConfigError(f"model.block_tokens is {block_tokens}: on a GPU a power of two")
    if config.deterministic and block_tokens < GPU_BLOCK_TOKENS:
        # a cached prefix of fewer would cut the keys of a prompt elsewhere than a prefill of all of it
        raise ConfigError(f"model.block_tokens is {block_tokens}: deterministic on a GPU needs at least {GPU_BLOCK_TOKENS}")
    # a chunk's keys would be cut where a whole prompt's are not
    name = "chunk_tokens" if config.prefill.mode == "chunked" else "long_chunk_tokens"
    chunk_tokens: int = getattr(config.prefill, name)
    if config.deterministic and chunk_tokens % block_tokens:
        raise ConfigError(
            f"prefill.{name} is {chunk_tokens}: deterministic on a GPU needs a multiple of model.block_tokens ({block_tokens})"
        )
    if prompts > MAX_WAVE_PROMPTS:
        raise ConfigError(f"prefill.max_wave_prompts is {prompts}: kernels of a GPU are made ready for {MAX_WAVE_PROMPTS} at most")
    if model.head_dim < 16 or model.head_dim & (model.head_dim - 1):
        raise ModelError(f"head_dim {model.head_dim} of {config.model.path}: on a GPU a power of two from 16 on", code="bad_model_config")


def device_bytes(card: Card) -> DeviceBytes:
    """Of a card whose free memory is unknown the whole is taken for free: the replica, which can ask, plans again."""
    return DeviceBytes(total=card.total_bytes, free=card.total_bytes if card.free_bytes is None else card.free_bytes)


def _pick(config: DuomoConfig, look: Callable[[], Host] | None) -> Pick:
    wanted = config.model.device
    if config.ray.address != "local" and wanted != "cpu":
        if wanted == "cuda":
            return Pick(device="cuda", why="device cuda: model.device says so, of the Ray cluster's machines")
        return Pick(device="cpu", why="device cpu: the Ray cluster's machines are not looked at; --device cuda asks for their cards")
    return pick_device(wanted, look)
