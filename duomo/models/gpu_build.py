"""Owns how a checkpoint's tensors become GpuWeights: joined, stacked, turned to fp8. Knows no file and no generator of numbers.

Every tensor is written straight into its place, one at a time: a model is never held twice. What fp8 cannot hold as the kernels read it
stays in half precision, and the log says why.

Legend: D model, E experts, F expert hidden, N rows out, K columns in; d, f, n, k their blocks of 128.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from duomo.errors import ModelError
from duomo.models.checkpoint import Entry, ExpertEntries, embed_entry, head_entry, layer_entries, norm_entry
from duomo.models.config import ModelConfig
from duomo.models.gpu_weights import GpuLayer, GpuWeights, LinearWeights
from duomo.models.rope import tables_for
from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights
from duomo_kernels._weights_fp8 import quantise_blocks_fp8
from duomo_kernels.qk_rope_write import QkNorm, RopeTables

log = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


class WeightSource(Protocol):
    """Where a checkpoint's tensors come from."""

    def fill(self, entry: Entry, out: Tensor) -> None:
        """Write the tensor into out (of its shape), rounded to out's dtype."""

    def is_fp8(self, entry: Entry) -> bool:
        """Whether it is held in fp8 with a scale for every 128 x 128 weights."""

    def fill_fp8(self, entry: Entry, out_NK: Tensor, scale_nk: Tensor) -> None:
        """Write such a tensor and its scales as they are held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTarget:
    """What the weights become. quantise "fp8": products that the source holds wide are turned to fp8; dtype is then a half precision.
    What the source holds in fp8 stays fp8 unless dtype is float32."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    quantise: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        if self.quantise is not None and self.dtype not in HALVES:
            raise ModelError(f"weights in fp8 need activations in bfloat16 or float16, not {self.dtype}", code="bad_quantisation")


def build_weights(config: ModelConfig, source: WeightSource, target: WeightTarget) -> GpuWeights:
    """The whole model on target.device. Raises what the source raises."""
    build = _Build(source, target)
    embed_VD = build.wide(embed_entry(config))
    layers = tuple(build.layer(config, layer_idx) for layer_idx in range(config.num_layers))
    head = head_entry(config)
    cos_PD, sin_PD = (table.to(target.device) for table in tables_for(config))
    weights = GpuWeights(
        config=config,
        embed_VD=embed_VD,
        layers=layers,
        norm_D=build.wide(norm_entry(config)),
        head_VD=embed_VD if head is None else build.wide(head),
        rope=RopeTables(cos_PD=cos_PD, sin_PD=sin_PD),
    )
    if target.device.type == "cuda":
        torch.cuda.empty_cache()  # float32 of the largest tensor, which a plan of the memory would take for in use
    for reason in build.kept_wide:
        log.warning("%s: weights kept in %s, not fp8: %s", config.architecture, target.dtype, reason)
    return weights


class _Build:
    """One model in the making. kept_wide: why products are not in fp8 although they could have been, in the order of discovery."""

    def __init__(self, source: WeightSource, target: WeightTarget) -> None:
        self._source = source
        self._target = target
        self.kept_wide: dict[str, None] = {}

    def layer(self, config: ModelConfig, layer_idx: int) -> GpuLayer:
        entries = layer_entries(config, layer_idx)
        qk_norm = None
        if entries.qk_norm is not None:
            q_weight, k_weight = (self.wide(entry) for entry in entries.qk_norm)
            qk_norm = QkNorm(q_weight=q_weight, k_weight=k_weight, eps=config.norm_eps)
        return GpuLayer(
            input_norm_D=self.wide(entries.input_norm),
            qkv=self.linear("query, key and value", entries.qkv),
            qk_norm=qk_norm,
            out=self.linear("attention output", (entries.out,)),
            post_norm_D=self.wide(entries.post_norm),
            router_ED=None if entries.router is None else self.wide(entries.router),
            experts=self.experts(entries.experts),
        )

    def wide(self, entry: Entry) -> Tensor:
        """In the model's half precision (or float32)."""
        out = self._empty(entry.shape)
        self._source.fill(entry, out)
        return out

    def linear(self, what: str, entries: Sequence[Entry]) -> LinearWeights:
        """Products over the same columns, one below the other."""
        rows, columns = [entry.shape[0] for entry in entries], entries[0].shape[1]
        if self._are_held_fp8(what, entries):
            if all(sum(rows[:at]) % SCALE_BLOCK == 0 for at in range(len(rows))):
                return self._held_linear(entries)
            self.kept_wide[f"{what}: of {' + '.join(map(str, rows))} rows some share a scale's block of {SCALE_BLOCK}"] = None
        weight_NK = self._empty((sum(rows), columns))
        for entry, part_NK in zip(entries, torch.split(weight_NK, rows), strict=True):
            self._source.fill(entry, part_NK)
        if self._target.quantise is None:
            return LinearWeights(weight_NK=weight_NK)
        stored_1NK, scale_1nk = quantise_blocks_fp8(weight_NK[None])
        return LinearWeights(weight_NK=stored_1NK[0], scale_nk=scale_1nk[0])

    def _held_linear(self, entries: Sequence[Entry]) -> LinearWeights:
        stored_NK, scale_nk = self._empty_fp8((sum(entry.shape[0] for entry in entries), entries[0].shape[1]))
        at = 0
        for entry in entries:
            end = at + entry.shape[0]
            self._source.fill_fp8(entry, stored_NK[at:end], scale_nk[at // SCALE_BLOCK : -(-end // SCALE_BLOCK)])
            at = end
        return LinearWeights(weight_NK=stored_NK, scale_nk=scale_nk)

    def experts(self, experts: Sequence[ExpertEntries]) -> ExpertWeights:
        width, hidden = experts[0].gate.shape
        is_held_fp8 = self._are_held_fp8("experts", [entry for expert in experts for entry in expert])
        if is_held_fp8 or self._target.quantise is not None:
            if width % SCALE_BLOCK == 0:
                return self._fp8_experts(experts, self._fill_held if is_held_fp8 else self._fill_quantised)
            self.kept_wide[f"experts: gate and up, {width} rows each, share a scale's block of {SCALE_BLOCK}"] = None
        gate_up_EFD, down_EDF = self._empty((len(experts), 2 * width, hidden)), self._empty((len(experts), hidden, width))
        for expert, gate_up_FD, down_DF in zip(experts, gate_up_EFD, down_EDF, strict=True):
            self._fill_wide(expert, gate_up_FD, down_DF)
        return ExpertWeights(gate_up_EFD=gate_up_EFD, down_EDF=down_EDF)

    def _fp8_experts(
        self, experts: Sequence[ExpertEntries], fill: Callable[[ExpertEntries, LinearWeights, LinearWeights], None]
    ) -> ExpertWeights:
        width, hidden = experts[0].gate.shape
        gate_up_EFD, gate_up_scale_Efd = self._empty_fp8((len(experts), 2 * width, hidden))
        down_EDF, down_scale_Edf = self._empty_fp8((len(experts), hidden, width))
        for at, expert in enumerate(experts):
            gate_up = LinearWeights(weight_NK=gate_up_EFD[at], scale_nk=gate_up_scale_Efd[at])
            fill(expert, gate_up, LinearWeights(weight_NK=down_EDF[at], scale_nk=down_scale_Edf[at]))
        return ExpertWeights(gate_up_EFD=gate_up_EFD, down_EDF=down_EDF, gate_up_scale_Efd=gate_up_scale_Efd, down_scale_Edf=down_scale_Edf)

    def _fill_wide(self, expert: ExpertEntries, gate_up_FD: Tensor, down_DF: Tensor) -> None:
        gate_FD, up_FD = gate_up_FD.chunk(2)
        for entry, out in zip(expert, (gate_FD, up_FD, down_DF), strict=True):
            self._source.fill(entry, out)

    def _fill_held(self, expert: ExpertEntries, gate_up: LinearWeights, down: LinearWeights) -> None:
        assert gate_up.scale_nk is not None and down.scale_nk is not None
        halves = zip(expert[:2], gate_up.weight_NK.chunk(2), gate_up.scale_nk.chunk(2), strict=True)
        for entry, stored_NK, scale_nk in (*halves, (expert.down, down.weight_NK, down.scale_nk)):
            self._source.fill_fp8(entry, stored_NK, scale_nk)

    def _fill_quantised(self, expert: ExpertEntries, gate_up: LinearWeights, down: LinearWeights) -> None:
        """One expert at a time: a layer's would need several times its size in float32."""
        wide = self._empty(tuple(gate_up.weight_NK.shape)), self._empty(tuple(down.weight_NK.shape))
        self._fill_wide(expert, *wide)
        for wide_NK, into in zip(wide, (gate_up, down), strict=True):
            assert into.scale_nk is not None
            stored_1NK, scale_1nk = quantise_blocks_fp8(wide_NK[None])
            into.weight_NK.copy_(stored_1NK[0])
            into.scale_nk.copy_(scale_1nk[0])

    def _are_held_fp8(self, what: str, entries: Sequence[Entry]) -> bool:
        if self._target.dtype not in HALVES:
            return False
        held = [self._source.is_fp8(entry) for entry in entries]
        if any(held) and not all(held) and self._target.quantise is None:
            self.kept_wide[f"{what}: only some of their weights are held in fp8"] = None
        return all(held)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._target.dtype, device=self._target.device)

    def _empty_fp8(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Weights, and a scale for every block of the last two axes."""
        blocks = (*shape[:-2], *(-(-side // SCALE_BLOCK) for side in shape[-2:]))
        return torch.empty(shape, dtype=FP8, device=self._target.device), torch.empty(
            blocks, dtype=torch.float32, device=self._target.device
        )
