"""Owns the start of an engine on one GPU: weights, memory plan, pool, prefill and captured decode, in that order. Knows no service.

What does not fit is refused with figures, before anything is loaded where estimates say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from duomo.config import KvDtype
from duomo.engine.compile_counter import CompileCounter
from duomo.engine.decode_step import DecodeLimits
from duomo.engine.gpu_captured_layers import CapturedLimits
from duomo.engine.gpu_decode import GpuDecode
from duomo.engine.gpu_first_tokens import GpuFirstTokens
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_kv_messages import warm_messages
from duomo.engine.gpu_prefill import GpuPrefill
from duomo.engine.gpu_profile import wave_bytes
from duomo.engine.gpu_warm import warm_prefill
from duomo.engine.memory_plan import DeviceBytes, Measured, MemoryLimits, MemoryPlan, captured_rows, plan_memory
from duomo.engine.startup import Startup
from duomo.errors import ConfigError
from duomo.models.config import ModelConfig
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_weights import GpuWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStart:
    """What an engine starts with. load: fills the weights on the device. limits.part: what it is for. kv_dtype: of messages.

    memory: of the device, None where it is asked itself. is_shared: others take and give back memory of the same card meanwhile, so only
    what this process' allocator holds is measured; `memory` is its share of the card (card_shares.share_of) then.
    """

    config: ModelConfig
    load: Callable[[], GpuWeights]
    limits: MemoryLimits
    device: torch.device
    is_deterministic: bool = False
    kv_dtype: KvDtype = "model"
    memory: DeviceBytes | None = None
    is_shared: bool = False
    shows_progress: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillPart:
    """Waves, and the sampler of their first tokens."""

    prefill: GpuPrefill
    first_tokens: GpuFirstTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuEngine:
    """Prefill and decode, or one of them, over one pool and one copy of the weights, warm. compilations: counted after ready: now."""

    plan: MemoryPlan
    cache: GpuKvCache
    compilations: CompileCounter
    prefill_part: PrefillPart | None
    decode_part: GpuDecode | None

    @property
    def prefill(self) -> GpuPrefill:
        assert self.prefill_part is not None, "this engine was started for decode alone"
        return self.prefill_part.prefill

    @property
    def first_tokens(self) -> GpuFirstTokens:
        assert self.prefill_part is not None, "this engine was started for decode alone"
        return self.prefill_part.first_tokens

    @property
    def decode(self) -> GpuDecode:
        assert self.decode_part is not None, "this engine was started for prefill alone"
        return self.decode_part


def start_engine(start: EngineStart, startup: Startup) -> GpuEngine:
    """Raises ConfigError with figures where it does not fit, and what start.load raises. Whoever ends the engine closes `compilations`."""
    compilations = CompileCounter()
    try:
        return _started(start, startup, compilations)
    except BaseException:
        compilations.close()
        raise


def _started(start: EngineStart, startup: Startup, compilations: CompileCounter) -> GpuEngine:
    memory = _device_bytes(start.device) if start.memory is None else start.memory
    plan_memory(start.config, memory, start.limits)
    held = _held_bytes(start.device)
    with startup.phase("weights"), _refusing("the weights do not fit: take --quantize fp8 or a smaller model", memory):
        weights = start.load()
    decoder = GpuDecoder(weights, is_deterministic=start.is_deterministic)
    prefills = start.limits.part != "decode"
    # before memory is measured: its buffers count with the weights
    first_tokens = GpuFirstTokens(start.config.vocab, start.device) if prefills else None
    measured = Measured(weights=_taken_since(memory, held, start))
    with startup.phase("profile"), _refusing(_too_long_a_wave(start.limits), memory):
        plan_memory(start.config, memory, start.limits, measured)
        measured = replace(measured, activations=wave_bytes(decoder, start.limits) if prefills else None)
    plan = plan_memory(start.config, memory, start.limits, measured)
    for line in plan.lines():
        log.info("memory: %s", line)
    too_much = "KV blocks, buffers and graphs take more than was planned for them: lower gpu_memory_fraction"
    with startup.phase("capture"), _refusing(too_much, memory):
        cache = _pool(decoder, plan.num_blocks, start)
        startup.part("decode steps")
        decode = _decode(decoder, cache, start) if start.limits.part != "prefill" else None
        startup.part("waves")
        prefill = None if first_tokens is None else _prefill_part(decoder, cache, start, first_tokens)
        _warm_handoff(cache, start)
        if first_tokens is not None and start.device.type == "cuda":
            first_tokens.warm()
    graphs = (0 if decode is None else decode.graphs.pool_bytes) + (0 if prefill is None else prefill.prefill.graph_bytes)
    if graphs > plan.graphs and not start.is_shared:  # what another process took meanwhile would count as theirs
        log.warning("graphs took %.2f GB, planned were %.2f GB: the reserve has less", graphs / 1e9, plan.graphs / 1e9)
    if prefill is not None and prefill.prefill.num_graphs:
        log.info("captured %s", prefill.prefill.capture_line())
    num_graphs = (0 if decode is None else len(decode.graphs)) + (0 if prefill is None else prefill.prefill.num_graphs)
    log.info("%d graphs, %d kernels compiled; %s", num_graphs, compilations.num_before_ready, startup.line())
    compilations.ready()
    return GpuEngine(plan=plan, cache=cache, compilations=compilations, prefill_part=prefill, decode_part=decode)


def _pool(decoder: GpuDecoder, num_blocks: int, start: EngineStart) -> GpuKvCache:
    spec = gpu_kv_spec(start.config, block_tokens=start.limits.block_tokens, dtype=decoder.weights.dtype)
    return GpuKvCache(spec, num_blocks, start.device)


def _decode(decoder: GpuDecoder, cache: GpuKvCache, start: EngineStart) -> GpuDecode:
    limits = DecodeLimits(
        max_batch=start.limits.max_batch, max_model_tokens=start.limits.max_model_tokens, is_deterministic=start.is_deterministic
    )
    decode = GpuDecode(decoder, cache, limits)
    decode.capture(progress=start.shows_progress)
    return decode


def _prefill_part(decoder: GpuDecoder, cache: GpuKvCache, start: EngineStart, first_tokens: GpuFirstTokens) -> PrefillPart:
    prefill = GpuPrefill(decoder, cache)
    if start.device.type == "cuda":  # an interpreter has nothing to compile
        warm_prefill(prefill, start.limits)
        prefill.capture(_captured_limits(start.config, start.limits), first_tokens, progress=start.shows_progress)
    return PrefillPart(prefill=prefill, first_tokens=first_tokens)


def _warm_handoff(cache: GpuKvCache, start: EngineStart) -> None:
    """Compile what packs or lands KV, where it leaves this engine or comes from another. Touches a block that nobody holds."""
    if start.device.type == "cuda" and start.limits.part != "both":
        warm_messages(cache, start.limits.part, start.kv_dtype)
        cache.tensor.zero_()


def _captured_limits(config: ModelConfig, limits: MemoryLimits) -> CapturedLimits:
    """Chunks as short as graphs are made for, of prompts as long as may be with what is cached of them."""
    return CapturedLimits(max_rows=captured_rows(config, limits), max_sequence_tokens=limits.max_model_tokens)


def _device_bytes(device: torch.device) -> DeviceBytes:
    free, total = torch.cuda.mem_get_info(device)
    return DeviceBytes(total=total, free=free)


def _held_bytes(device: torch.device) -> int:
    """By this process' allocator."""
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0


def _taken_since(memory: DeviceBytes, held: int, start: EngineStart) -> int | None:
    """What the device has less than at the start, or on a shared card what our allocator holds more; None where there is none to ask."""
    if start.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    if start.is_shared:
        return max(0, _held_bytes(start.device) - held)
    return max(0, memory.free - torch.cuda.mem_get_info(start.device)[0])


def _too_long_a_wave(limits: MemoryLimits) -> str:
    lower = "max_wave_tokens" if limits.most_rows == limits.max_wave_tokens else "long_chunk_tokens"
    return f"a wave of {limits.most_rows} tokens does not fit beside the weights: lower prefill.{lower}"


@contextmanager
def _refusing(why: str, memory: DeviceBytes) -> Iterator[None]:
    """Where estimates were too small: a device that has no more is refused in words, as what the plan sees is."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        figures = f"{memory.total / 1e9:.1f} GB on the device, {memory.free / 1e9:.1f} GB of them free at the start"
        raise ConfigError(f"{why} ({figures})", code="does_not_fit") from error
