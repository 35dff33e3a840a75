"""Owns what packs KV of a GPU's pool into sealed messages, and lands them there again. Knows no ring, handle or slot.

A message is what kv_hash_pack.py says, or kv_fp8_pack.py: payload, padding, trailer; the bytes of the CPU's pack and hash.

    pack    gather + hash, wait; on a stream of its own, which goes before the layers that are being computed beside it
    land    scatter + verify, on the caller's stream, so between two steps; its verdict comes later

In the device's memory (a tensor of bytes) a message is read and written where it lies. One in the host's (a memoryview) crosses a buffer on
the device: host memory that is page-locked is copied from and to without the processor; other memory works too, and then a copy holds its
caller up.
Whoever asks for a pack has seen the blocks computed, so that nothing on any stream writes them any more, or names the event behind it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from duomo.config import KvDtype
from duomo.engine.gpu_held_calls import held_calls
from duomo.engine.gpu_host_ring import HostBuffer
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.kv_messages import block_rows, message_block_bytes
from duomo_kernels.kv_fp8_pack import kv_fp8_land, kv_fp8_pack
from duomo_kernels.kv_hash_pack import GOOD, START_BYTES, Seal, hash_scratch, kv_hash_pack, kv_verify_scatter, trailer_word

_WORD_BYTES = 8
_Gather = Callable[[Tensor, range, Tensor, Tensor, Seal, Tensor], None]
_Scatter = Callable[[Tensor, range, Tensor, Tensor, Seal, Tensor, Tensor], None]
_KEPT_IDS = 64


class GpuKvPacker:
    """Packs messages one behind the other. One thread, and its own stream."""

    def __init__(self, cache: GpuKvCache, kv_dtype: KvDtype = "model") -> None:
        self._buffer = _MessageBuffer(cache, kv_dtype)
        is_cuda = cache.device.type == "cuda"
        # of high priority: a message that waits for the layers beside it is late for the rest of them
        self._stream = torch.cuda.Stream(cache.device, priority=-1) if is_cuda else None  # type: ignore[no-untyped-call]  # torch ships no types
        self._scratch = hash_scratch(cache.device)
        self._marks: list[_Mark] = []
        self._thread = 0
        if is_cuda:
            torch.cuda.synchronize(cache.device)  # the scratch was zeroed on the caller's stream

    def launch(
        self, layers: range, blocks: Sequence[int], seal: Seal, out: memoryview | Tensor, after: torch.cuda.Event | None = None
    ) -> PackingMessage | None:
        """Queue the whole message, trailer included, into `out`, which is exactly as long and stays. None: it lies there already.

        after: recorded behind what writes the blocks, with timing. The device waits for it, and every later message behind this one.
        Takes the calling thread for its own: that thread's current stream is the packer's afterwards.
        """
        if self._stream is None:
            self._queue(layers, blocks, seal, out)
            return None
        if threading.get_ident() != self._thread:  # its current stream from here on: entering it for every message takes long
            self._thread = threading.get_ident()
            torch.cuda.set_device(self._buffer.device)
            torch.cuda.set_stream(self._stream)
        if after is not None:
            self._stream.wait_event(after)
        self._queue(layers, blocks, seal, out)
        mark = self._marks.pop() if self._marks else _Mark(self._buffer.device)
        mark.set()
        return PackingMessage(mark, self._marks, after)

    def pack(self, layers: range, blocks: Sequence[int], seal: Seal, out: memoryview | Tensor) -> None:
        """As launch(), in a thread that goes on with its own stream; returns when it is there."""
        if self._stream is None:
            self._queue(layers, blocks, seal, out)
            return
        with torch.cuda.device(self._buffer.device), torch.cuda.stream(self._stream):
            self._queue(layers, blocks, seal, out)
            self._stream.synchronize()

    def _queue(self, layers: range, blocks: Sequence[int], seal: Seal, out: memoryview | Tensor) -> None:
        message_M = self._buffer.of(out) if isinstance(out, memoryview) else out.view(torch.int64)
        self._buffer.gather(self._buffer.pool, layers, self._buffer.ids(blocks), message_M, seal, self._scratch)
        if isinstance(out, memoryview):
            _words(out).copy_(message_M, non_blocking=True)


class PackingMessage:
    """A message under way out of its blocks. wait() is called once. after: what the device waits for before it packs."""

    def __init__(self, mark: _Mark, marks: list[_Mark], after: torch.cuda.Event | None) -> None:
        self._mark = mark
        self._marks = marks
        self._after = after

    def is_over(self) -> bool:
        return self._mark.is_over()

    def wait(self) -> float | None:
        """Gives the interpreter away, and not the core: waking up may take as long as the packing. Until that begins also the core, where
        `after` blocks. Seconds that the device has packed for behind `after`."""
        if self._after is not None:
            self._after.synchronize()
        self._mark.wait()
        took_s = None if self._after is None else self._mark.since_s(self._after)
        self._marks.append(self._mark)
        return took_s


class GpuKvLander:
    """Lands messages one behind the other on the stream that is current: the one on which steps are launched. One thread."""

    def __init__(self, cache: GpuKvCache, kv_dtype: KvDtype = "model") -> None:
        self._buffer = _MessageBuffer(cache, kv_dtype)
        self._scratch = hash_scratch(cache.device)
        self._answers: list[LandingMessage] = []

    def launch(self, layers: range, blocks: Sequence[int], seal: Seal, message: memoryview | Tensor) -> LandingMessage:
        """Queue scatter and verification of a whole message. `message` is read until the answer is over; give_back() the answer then."""
        if isinstance(message, memoryview):
            message_M = self._buffer.of(message)
            message_M.copy_(_words(message), non_blocking=True)
        else:
            message_M = message.view(torch.int64)
        answer = self._answers.pop() if self._answers else LandingMessage(self._buffer.device)
        self._buffer.scatter(self._buffer.pool, layers, self._buffer.ids(blocks), message_M, seal, self._scratch, answer.flag_1)
        answer.fetch()
        return answer

    def give_back(self, answer: LandingMessage) -> None:
        """One that is over and read: the next message's."""
        assert answer.is_over()
        self._answers.append(answer)


class LandingMessage:
    """A message under way into its blocks. Those are not to be read before is_over() and is_right()."""

    def __init__(self, device: torch.device) -> None:
        self.flag_1 = torch.empty(1, dtype=torch.int32, device=device)
        self._verdict = HostBuffer(1, device)

    def fetch(self) -> None:
        """Queue the copy of the verdict."""
        self._verdict.download(self.flag_1)
        self._verdict.mark()

    def is_over(self) -> bool:
        """Whether the verdict is here; the message's memory is not read any more then."""
        return self._verdict.is_over()

    def wait(self) -> None:
        """Return when it is over: with everything that was queued before it."""
        self._verdict.wait()

    def is_right(self) -> bool:
        """Whether the blocks hold what was sent. Only once it is over."""
        assert self.is_over()
        return int(self._verdict.array[0]) == GOOD


class _Mark:
    """An event on the stream that is current when it is set; used again and again, since making one takes long."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = held_calls()
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch ships no types for it
        self._event.record()  # torch makes an event when it is recorded first
        self._handle: int = self._event.cuda_event

    def set(self) -> None:
        self._calls.mark(self._handle, int(torch.cuda.current_stream(self._device).cuda_stream))

    def is_over(self) -> bool:
        return self._calls.is_over(self._handle)

    def wait(self) -> None:
        self._event.synchronize()

    def since_s(self, earlier: torch.cuda.Event) -> float:
        """Seconds by the device's clock, both being over."""
        return float(earlier.elapsed_time(self._event)) / 1000


class _MessageBuffer:
    """The pool as the kernels of this dtype see it, these, and memory on the device as large as the largest message yet."""

    def __init__(self, cache: GpuKvCache, kv_dtype: KvDtype) -> None:
        self.device = cache.device
        self.pool = _pool_of(cache, kv_dtype)
        self.gather: _Gather = kv_hash_pack if kv_dtype == "model" else kv_fp8_pack
        self.scatter: _Scatter = kv_verify_scatter if kv_dtype == "model" else kv_fp8_land
        self._message_M = torch.empty(0, dtype=torch.int64, device=cache.device)
        self._ids: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def of(self, message: memoryview) -> Tensor:
        """Room for this message. A larger one replaces the buffer: torch's allocator keeps the old one until its stream has passed."""
        num_words = message.nbytes // _WORD_BYTES
        if num_words > self._message_M.numel():
            self._message_M = torch.empty(num_words, dtype=torch.int64, device=self.device)
        return self._message_M[:num_words]

    def ids(self, blocks: Sequence[int]) -> Tensor:
        """Block ids on the device. Those of the last messages are there: all groups of a prompt go to, or come from, the same blocks."""
        key = tuple(blocks)
        found = self._ids.get(key)
        if found is None:
            found = torch.tensor(blocks, dtype=torch.int32, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
            self._ids[key] = found
            if len(self._ids) > _KEPT_IDS:
                self._ids.popitem(last=False)
        else:
            self._ids.move_to_end(key)
        return found


def _pool_of(cache: GpuKvCache, kv_dtype: KvDtype) -> Tensor:
    """The pool as the kernel reads it: int64 words of blocks [L, B, W], or rows of numbers [L, B, R, D]."""
    spec = cache.spec
    if kv_dtype == "fp8_e4m3":
        return cache.tensor.view(spec.num_layers, cache.num_blocks, block_rows(spec), spec.head_dim)
    assert spec.block_bytes % 64 == 0, f"blocks of {spec.block_bytes} bytes would need padding, which the kernel does not write"
    return cache.tensor.view(torch.int64).view(spec.num_layers, cache.num_blocks, spec.block_bytes // _WORD_BYTES)


def _words(message: memoryview) -> Tensor:
    """The host's memory itself, as int64 words."""
    assert message.nbytes % _WORD_BYTES == 0, message.nbytes
    return torch.frombuffer(message, dtype=torch.int64)


def warm_messages(cache: GpuKvCache, part: Literal["prefill", "decode"], kv_dtype: KvDtype = "model") -> None:
    """Compile what this part of a pair launches: one message of one block. Writes block 0."""
    num_words = message_block_bytes(cache.spec, kv_dtype) // _WORD_BYTES
    message = memoryview(bytearray((trailer_word(num_words) + 8) * _WORD_BYTES))
    seal = Seal(handle_id=0, group=0, message_idx=0, start=bytes(START_BYTES))
    if part == "prefill":
        GpuKvPacker(cache, kv_dtype).pack(range(1), [0], seal, message)
    else:
        GpuKvLander(cache, kv_dtype).launch(range(1), [0], seal, message)
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)
