"""Owns the parameters by which rows draw, on their way from requests to the tensors that the sampling kernels read. Knows no logits.

All parameters lie in one buffer on the device, side by side by name, and are copied there whole when a row comes, goes or moves; in between
a step sends nothing. Rows with penalties or biases hold a slot: a table of tokens seen, which the sampling kernels keep up themselves, and
a list of biases. Rows under a grammar have a mask each, one after the other, which are sent for every step: fill_masks().

Legend: R rows, E ending ids, V vocabulary, L slots, M masks, W words of 32 ids, B biases.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duomo.engine.decode_step import MAX_ENDINGS, DecodeRow, Joining
from duomo.engine.gpu_host_ring import HostRing
from duomo_kernels._sampling import MAX_VOCAB, Penalties, SampleRows, empty_biases, empty_masks, empty_tables, fill_slot
from duomo_kernels.sample import Mode

if TYPE_CHECKING:
    from duomo.engine.sampler import RowSampling

FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
INTS = ("top_k", "choice", "num_top", "slot", "min_position", "mask", "num_biases")
FillMasks = Callable[[NDArray[np.int32]], None]  # writes the masks [M, W] of the rows that have one, in their order
GREEDY_TEMPERATURE: Final = np.float32(1e-5)  # as the kernels', compared in their precision: below, a row is greedy


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleKind:
    """What the rows of a step ask for together: which kernels sample it."""

    mode: Mode = "greedy"
    is_penalised: bool = False
    has_logprobs: bool = False


class _Sections:
    """Where each parameter lies in a buffer of 32-bit words: seeds [R] of 64 bits, then FLOATS and INTS [R] each, then endings [R, E]."""

    def __init__(self, max_rows: int) -> None:
        self.stride = -(-max_rows // 4) * 4  # every section starts at a multiple of 16 bytes
        self.endings = self.stride * (2 + len(FLOATS) + len(INTS))
        self.num_words = self.endings + self.stride * MAX_ENDINGS

    def start(self, name: str) -> int:
        return self.stride * (2 + (FLOATS + INTS).index(name))


# One row of FLOATS and INTS, as one call writes them: the first step of a sequence waits for what is done here, whose code nobody has run
# since the last one came, so that each further call of numpy's costs microseconds.
_ROW: Final = struct.Struct(f"{len(FLOATS)}f{len(INTS)}i")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What decides which kernels sample a row. min_position: below it endings are masked."""

    draws: bool
    is_limited: bool
    has_slot_or_mask: bool
    has_logprobs: bool
    min_position: int


_NOTHING: Final = _Asked(draws=False, is_limited=False, has_slot_or_mask=False, has_logprobs=False, min_position=0)


class _Image:
    """The parameters as the host last wrote them."""

    def __init__(self, sections: _Sections) -> None:
        self.words = np.zeros(sections.num_words, np.int32)
        stride = sections.stride
        self.seed_R = self.words[: 2 * stride].view(np.int64)
        self.both = self.words[2 * stride : sections.endings].reshape(-1, stride)
        self.ending_RE = self.words[sections.endings :].reshape(stride, MAX_ENDINGS)
        self.slot_R, self.mask_R = (self.both[len(FLOATS) + INTS.index(name)] for name in ("slot", "mask"))
        self.asked: list[_Asked] = []

    def move(self, sources: list[int]) -> None:
        """Row i becomes what row sources[i] was; of -1 nothing is asked until put()."""
        num_rows = len(sources)
        self.asked = [self.asked[source] if source >= 0 else _NOTHING for source in sources]
        if all(source in (at, -1) for at, source in enumerate(sources)):
            return  # rows came, and none moved
        self.seed_R[:num_rows] = self.seed_R[sources]
        self.both[:, :num_rows] = self.both[:, sources]
        self.ending_RE[:num_rows] = self.ending_RE[sources]

    def number_masks(self, num_rows: int) -> int:
        """Give the rows that have one a mask each, in their order; how many they are."""
        mask_R = self.mask_R[:num_rows]
        held = (mask_R >= 0).nonzero()[0]
        mask_R[held] = np.arange(held.size)
        return int(held.size)

    def put(self, row: int, asked: RowSampling, slot: int) -> None:
        """Row `row` becomes what is asked; slot -1: no penalty and no bias."""
        sampling, has_mask = asked.sampling, asked.grammar is not None
        masks = sampling.min_tokens > 0 and len(asked.ending_ids) > 0 and not has_mask
        min_position = len(asked.prompt_ids) + sampling.min_tokens if masks else 0
        # a request may ask for more tokens than there are ids, and than a word holds: no limit either way
        top_k = sampling.top_k if sampling.top_k < MAX_VOCAB else 0
        self.seed_R[row] = ((sampling.seed + 2**63) % 2**64) - 2**63  # the low 64 bits
        packed = _ROW.pack(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
            top_k,
            asked.choice,
            -1 if sampling.logprobs is None else sampling.logprobs,
            slot,
            min_position,
            0 if has_mask else -1,  # number_masks() says which
            len(sampling.logit_bias),
        )
        self.both[:, row] = np.frombuffer(packed, np.int32)
        self.ending_RE[row] = -1
        if masks:
            assert len(asked.ending_ids) <= MAX_ENDINGS, "decode_step.check_sampling refuses such rows before they join"
            self.ending_RE[row, : len(asked.ending_ids)] = asked.ending_ids
        draws = bool(sampling.temperature >= GREEDY_TEMPERATURE)
        self.asked[row] = _Asked(
            draws=draws,
            is_limited=draws and (top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0),
            has_slot_or_mask=slot >= 0 or has_mask,
            has_logprobs=sampling.logprobs is not None,
            min_position=min_position,
        )

    def kind(self, rows: Sequence[DecodeRow]) -> SampleKind:
        """What these rows ask for, at the positions that they are fed."""
        draws = is_limited = is_penalised = has_logprobs = False
        for row, asked in zip(rows, self.asked, strict=True):
            draws |= asked.draws
            is_limited |= asked.is_limited
            is_penalised |= asked.has_slot_or_mask or row.position + 1 < asked.min_position
            has_logprobs |= asked.has_logprobs
        mode: Mode = "limited" if is_limited else "plain" if draws else "greedy"
        return SampleKind(mode=mode, is_penalised=is_penalised, has_logprobs=has_logprobs)


class GpuSampleRows:
    """The rows of the step launched last, on the host and on the device. Owns the penalty slots: they come back when rows go."""

    def __init__(self, max_rows: int, vocab: int, device: torch.device) -> None:
        self._sections = _Sections(max_rows)
        self._image = _Image(self._sections)
        self._words = torch.zeros(self._sections.num_words, dtype=torch.int32, device=device)
        self._ring = HostRing(self._sections.num_words, device)
        self._prompt_bits_LW, self._output_counts_LV = empty_tables(max_rows, vocab, device)
        self._bias_ids_LB, self._bias_LB = empty_biases(max_rows, device)
        self._mask_bits_MW = empty_masks(max_rows, vocab, device)
        self._mask_ring = HostRing(self._mask_bits_MW.numel(), device)
        self._num_masks = 0
        self._free_slots = list(range(max_rows - 1, -1, -1))
        self._num_rows = 0
        self._kind = SampleKind()
        self._may_mask = False  # whether the kind depends on positions

    def place(self, rows: Sequence[DecodeRow]) -> SampleKind:
        """Make these the rows; queues the copy of their parameters, on the current stream, where any came, went or moved."""
        sources = [row.source if isinstance(row.source, int) else -1 for row in rows]
        is_same = sources == list(range(self._num_rows))
        if not is_same:
            self._change(rows, sources)
        if not is_same or self._may_mask:
            self._kind = self._image.kind(rows)
            self._may_mask = any(asked.min_position for asked in self._image.asked)
        return self._kind

    def fill_masks(self, fill: FillMasks) -> None:
        """Have the masks made of the rows that have one, and queue their copy; `fill` is not called where none has.

        What it takes is free while the device still runs what was queued before.
        """
        if not self._num_masks:
            return
        buffer, width = self._mask_ring.take(), self._mask_bits_MW.shape[1]
        fill(buffer.array[: self._num_masks * width].reshape(self._num_masks, width))
        buffer.upload(self._mask_bits_MW[: self._num_masks].view(-1))

    def draws(self, num_rows: int, position_R: Tensor, num_valid: Tensor) -> SampleRows:
        """As the sampling kernels read them. position_R: of the tokens to sample."""
        return SampleRows(
            temperature_S=self._floats("temperature", num_rows),
            top_k_S=self._ints("top_k", num_rows),
            top_p_S=self._floats("top_p", num_rows),
            min_p_S=self._floats("min_p", num_rows),
            seed_S=self._words[: 2 * self._sections.stride].view(torch.int64)[:num_rows],
            choice_S=self._ints("choice", num_rows),
            position_S=position_R,
            num_valid=num_valid,
        )

    def penalties(self, num_rows: int) -> Penalties:
        """As the sampling kernels read them."""
        return Penalties(
            repetition_S=self._floats("repetition", num_rows),
            frequency_S=self._floats("frequency", num_rows),
            presence_S=self._floats("presence", num_rows),
            slot_S=self._ints("slot", num_rows),
            ending_ids_SE=self._words[self._sections.endings :].view(-1, MAX_ENDINGS)[:num_rows],
            min_position_S=self._ints("min_position", num_rows),
            prompt_bits_LW=self._prompt_bits_LW,
            output_counts_LV=self._output_counts_LV,
            mask_S=self._ints("mask", num_rows),
            mask_bits_MW=self._mask_bits_MW,
            num_biases_S=self._ints("num_biases", num_rows),
            bias_ids_LB=self._bias_ids_LB,
            bias_LB=self._bias_LB,
        )

    def warm(self) -> None:
        """Fill a slot once: what a first request with a penalty would wait for."""
        one = _device_ids([0], self._words.device)
        fill_slot(self._prompt_bits_LW[0], self._output_counts_LV[0], one, one)

    def num_top(self, num_rows: int) -> Tensor:
        """int32 [R]: how many likeliest tokens each row lists, -1: no log-probability at all."""
        return self._ints("num_top", num_rows)

    def _change(self, rows: Sequence[DecodeRow], sources: list[int]) -> None:
        named = [row.source for row in rows if isinstance(row.source, int)]
        continued = set(named)
        assert len(continued) == len(named) and all(0 <= at < self._num_rows for at in named), (named, self._num_rows)
        self._free_slots += [
            slot for at, slot in enumerate(self._image.slot_R[: self._num_rows].tolist()) if slot >= 0 and at not in continued
        ]
        self._image.move(sources)
        for at, row in enumerate(rows):
            if isinstance(row.source, Joining):
                self._image.put(at, row.source.sampling, self._slot_for(row.source.sampling))
        self._num_rows = len(rows)
        self._num_masks = self._image.number_masks(len(rows)) if any(asked.has_slot_or_mask for asked in self._image.asked) else 0
        buffer = self._ring.take()
        buffer.array[:] = self._image.words
        buffer.upload(self._words)

    def _slot_for(self, asked: RowSampling) -> int:
        """A slot filled with what the row has seen and its biases, on the current stream; -1 where it has no penalty and no bias."""
        if not asked.has_penalty and not asked.sampling.logit_bias:
            return -1
        slot = self._free_slots.pop()
        if asked.sampling.logit_bias:
            ids, biases = zip(*asked.sampling.logit_bias, strict=True)
            self._bias_ids_LB[slot, : len(ids)] = _device_ids(ids, self._words.device)
            self._bias_LB[slot, : len(ids)] = _on_device(torch.tensor(biases, dtype=torch.float32), self._words.device)
        prompt_ids, output_ids = (_device_ids(ids, self._words.device) for ids in (asked.prompt_ids, asked.output_ids))
        fill_slot(self._prompt_bits_LW[slot], self._output_counts_LV[slot], prompt_ids, output_ids)
        return slot

    def _floats(self, name: str, num_rows: int) -> Tensor:
        return self._ints(name, num_rows).view(torch.float32)

    def _ints(self, name: str, num_rows: int) -> Tensor:
        start = self._sections.start(name)
        return self._words[start : start + num_rows]


def _device_ids(ids: Sequence[int], device: torch.device) -> Tensor:
    return _on_device(torch.tensor(ids, dtype=torch.int64), device)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Queued: from page-locked memory nobody waits for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
