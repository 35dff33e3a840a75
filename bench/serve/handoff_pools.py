"""Owns what a measured handoff reads and writes on a device: pools, packing, landing, memory for rings, plain copies. Knows no agent.

A pool holds several prompts' worth of blocks, which handoffs use in turn, so that neither side reads or writes what lies in its caches from
the handoff before.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from duomo.engine.kv_cache import KvCache, KvSpec
from services.decode.landers import CpuLander, Lander
from services.kv_transfer.layout import MessageSpan, trailer_start
from services.kv_transfer.memory import Allocate, Memory, PageLocks, Region
from services.kv_transfer.push_job import Filling

NUM_SETS = 4  # prompts' worth of blocks in a pool
MIB = 1 << 20
_SPREAD = 0x1E3779B1  # odd: no two places have the same product; of its bits _FINITE leaves 28
_FINITE = 0x3FFF3FFF  # below 2 in bfloat16, float16 and float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is handed over: num_blocks blocks of every layer of spec."""

    spec: KvSpec
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.spec.num_layers * self.num_blocks * self.spec.block_bytes

    def table(self, turn: int) -> range:
        """The blocks of the turn-th handoff."""
        first = turn % NUM_SETS * self.num_blocks
        return range(first, first + self.num_blocks)


# 64 MiB of float32 KV with the heads of qwen3-30b-a3b: a block of a layer is 64 KiB.
CPU_SHAPE = Shape(spec=KvSpec(num_layers=16, num_kv_heads=4, head_dim=128, block_tokens=16), num_blocks=64)
# qwen3-30b-a3b, 2,048 tokens in a GPU's blocks: 192 MiB of bf16.
GPU_SHAPE = Shape(spec=KvSpec(num_layers=48, num_kv_heads=4, head_dim=128, block_tokens=64, dtype=torch.bfloat16), num_blocks=32)


def one_block(shape: Shape) -> Shape:
    """The smallest handoff: a block of one layer."""
    spec = shape.spec
    return Shape(
        spec=KvSpec(num_layers=1, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, block_tokens=spec.block_tokens, dtype=spec.dtype),
        num_blocks=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """One side's device, as its process counts, and where its rings and send slots lie: kv_transfer.memory."""

    device: str
    memory: Literal["host", "device"]

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def make_current(self) -> None:
        """In the thread that launches kernels: a replica sees one card, this process may see two."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    def allocate(self) -> Allocate:
        if not self.is_cuda or self.memory == "host":
            return Region
        from services.kv_transfer.device_memory import DeviceRegion

        return partial(DeviceRegion, device=torch.device(self.device))

    def locks(self) -> PageLocks | None:
        """As services/engine_start.py: a card copies from and to locked memory of the host by itself."""
        if not self.is_cuda or self.memory == "device":
            return None
        from duomo.engine.gpu_page_locks import GpuPageLocks

        return GpuPageLocks(torch.device(self.device))


class Pool:
    """NUM_SETS prompts' worth of blocks on one device, zeroed, with what serves them there."""

    def __init__(self, shape: Shape, where: Where) -> None:
        self.shape = shape
        num_blocks = NUM_SETS * shape.num_blocks
        self._packer: Any = None
        self.lander: Lander
        if where.is_cuda:
            from duomo.engine.gpu_kv_cache import GpuKvCache
            from duomo.engine.gpu_kv_messages import GpuKvPacker
            from services.decode.gpu_lander import GpuLander

            cache = GpuKvCache(shape.spec, num_blocks, torch.device(where.device))
            self.tensor, self._packer, self.lander = cache.tensor, GpuKvPacker(cache), GpuLander(cache)
        else:
            self._cache = KvCache(shape.spec, num_blocks)
            self.tensor, self.lander = self._cache.tensor, CpuLander(self._cache)
        self.is_sealed = where.is_cuda

    def fill(self, turn: int, handle_id: int, span: MessageSpan, place: Any) -> Filling | None:
        """A PushJob's fill: the blocks of the turn-th handoff, as a prefill worker packs them on this device."""
        blocks = self.shape.table(turn)[span.block_lo : span.block_hi]
        if self._packer is None:
            self._cache.pack(span.layers, blocks, place)
            return None
        from duomo_kernels.kv_hash_pack import Seal

        seal = Seal(handle_id=handle_id, group=span.group, message_idx=span.message_idx, start=trailer_start(handle_id, span))
        filling: Filling | None = self._packer.launch(span.layers, blocks, seal, place)
        return filling

    def blocks(self, turn: int) -> Tensor:
        """[layers, blocks, ...] of the turn-th handoff."""
        table = self.shape.table(turn)
        return self.tensor[:, table.start : table.stop]

    def flat_bytes(self) -> Tensor:
        return self.tensor.view(torch.uint8).view(-1)


def fill_pool(pool: Pool) -> None:
    """Words that differ by place but for a few, finite in every dtype, the same in every process and on every device."""
    for layer, blocks in enumerate(pool.tensor):
        words = blocks.view(-1).view(torch.int32)
        first = layer * words.numel()
        torch.arange(first, first + words.numel(), dtype=torch.int32, device=words.device, out=words)
        words.mul_(_SPREAD).bitwise_and_(_FINITE)


def as_bytes(memory: Memory) -> Tensor:
    """A region as uint8, on its device."""
    held = memory.slice(0, memory.num_bytes)
    return torch.frombuffer(held, dtype=torch.uint8) if isinstance(held, memoryview) else held


def copier(num_bytes: int, source: Where, target: Where) -> Callable[[int], float]:
    """Seconds of the turn-th copy of num_bytes out of memory that lies in no cache, by the plainest means: one thread's memcpy on a CPU,
    torch's copy_ from card to card (or within the one card) on GPUs."""
    if not target.is_cuda:
        regions = [Region(NUM_SETS * num_bytes) for _ in range(2)]
        for region in regions:
            ctypes.memset(region.address, 1, region.num_bytes)
        return partial(_memcpy_s, regions, num_bytes)
    tensors = [torch.ones(NUM_SETS, num_bytes, dtype=torch.uint8, device=where.device) for where in (source, target)]
    return partial(_card_copy_s, tensors)


def _memcpy_s(regions: list[Region], num_bytes: int, turn: int) -> float:
    at = turn % NUM_SETS * num_bytes
    started_s = time.perf_counter()
    ctypes.memmove(regions[1].address + at, regions[0].address + at, num_bytes)
    return time.perf_counter() - started_s


def _card_copy_s(tensors: list[Tensor], turn: int) -> float:
    source, target = tensors
    wait_for(source.device, target.device)
    started_s = time.perf_counter()
    target[turn % NUM_SETS].copy_(source[turn % NUM_SETS], non_blocking=True)
    wait_for(source.device, target.device)
    return time.perf_counter() - started_s


def wait_for(*devices: torch.device) -> None:
    """Everything queued on these devices is over."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
