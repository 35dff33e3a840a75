"""PURE: owns the division of one GPU's memory: weights, activations, graphs, buffers, and how many KV blocks are left. Knows no device.

Sizes that a run has measured replace the estimates here. Estimates count every tensor that a wave has alive at once in its widest layer;
they do not depend on who is routed where, since the kernels' tensors are as large as any routing needs.

    total = taken (others, and the CUDA context) + weights + activations + rows + graphs + buffers + handoff + kv + reserve

The reserve is what gpu_memory_fraction leaves alone: the allocator's fragments, libraries' workspaces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from duomo.engine.decode_buckets import buckets_up_to
from duomo.engine.decode_step import MAX_BIASES
from duomo.engine.wave_buckets import ALONE_MIN_ROWS, MAX_WAVE_PROMPTS, wave_buckets_up_to
from duomo.errors import ConfigError
from duomo.models.config import ModelConfig

Quantise = Literal["fp8"] | None
EnginePart = Literal["both", "prefill", "decode"]  # what an engine is for: one process for both services, or one of two pools
GPU_BLOCK_TOKENS = 64
SCALE_BLOCK = 128  # fp8 weights have one float32 scale for each block of 128 x 128
NODES_PER_LAYER = 12  # kernels of one decode layer
NODES_PER_WAVE_LAYER = 16  # of a captured layer of a wave
NODES_AROUND_WAVE = 32  # and around its layers: embeddings, logits, the count of what was routed where
NODES_PER_STEP = 16  # and of a step around its layers, samplers included
BYTES_PER_NODE = 32 * 1024  # assumed, and meant to be too much: with what libraries take for captures
LISTED_BYTES = 16384 * 8  # the sampler's list of candidates of one row: value and id
MAX_PIECES = 32  # of a sequence in deterministic attention (gpu_decode_attention.MAX_CHUNKS): more than it has otherwise
CUT_BYTES = 16  # of a tile of keys in the cut that all layers share
MAX_WAVE_GRAPH_BYTES = 2 * 10**9  # design 3.3
LONG_CHUNK_TOKENS = 8192  # duomo.config.PrefillSection's default
OVERTAKING_WAVES = 2
SMALL_WAVE_TOKENS = 2048  # what a refusal proposes
MIN_BLOCKS_PER_ROW = 2  # fewer, and a full batch could not hold its prompts' first tokens and grow


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBytes:
    """Of the whole card; free: before anything of the engine is loaded."""

    total: int
    free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimits:
    """What the plan must hold. quantise None: weights of `dtype_bytes` each, as activations and KV are.

    long_chunk_tokens: a prompt longer than a wave is computed in chunks of so many rows, if it is longer than these too. handoff_bytes: of
    send slots or landing rings, which are made when peers come.
    """

    max_batch: int
    max_wave_tokens: int
    max_model_tokens: int
    long_chunk_tokens: int = LONG_CHUNK_TOKENS
    block_tokens: int = GPU_BLOCK_TOKENS
    gpu_memory_fraction: float = 0.9
    dtype_bytes: int = 2
    quantise: Quantise = None
    part: EnginePart = "both"
    handoff_bytes: int = 0

    @property
    def most_rows(self) -> int:
        """Rows that cross a layer together at most: of a wave, or of a chunk of the longest prompt."""
        return max(self.max_wave_tokens, min(self.long_chunk_tokens, self.max_model_tokens))

    @property
    def live_rows(self) -> int:
        """Rows that lie between two pieces at most: of the longest prompt or wave, and of waves that overtake it
        (services/prefill/snapshot.py keeps to it)."""
        return max(self.max_model_tokens, self.max_wave_tokens) + OVERTAKING_WAVES * self.max_wave_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Bytes that a run has seen; None: the estimate counts."""

    weights: int | None = None
    activations: int | None = None
    graphs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes by use, and the blocks that fit into what is left."""

    total: int
    taken: int
    weights: int
    activations: int
    rows: int
    graphs: int
    buffers: int
    handoff: int
    kv: int
    reserve: int
    num_blocks: int
    block_bytes: int
    block_tokens: int
    measured: Measured

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV fits."""
        return self.num_blocks * self.block_tokens

    def lines(self) -> list[str]:
        """For people, one line each use."""

        def line(name: str, num_bytes: int, note: str = "") -> str:
            return f"{name:<12}{num_bytes / 1e9:8.2f} GB{'  ' + note if note else ''}"

        def source(value: int | None) -> str:
            return "measured" if value is not None else "estimated"

        return [
            line("device", self.total),
            line("taken", self.taken, "by others and the CUDA context"),
            line("weights", self.weights, source(self.measured.weights)),
            line("activations", self.activations, f"{source(self.measured.activations)}, the widest layer of a wave or chunk"),
            line("rows", self.rows, "of waves and long prompts, between two pieces"),
            line("graphs", self.graphs, source(self.measured.graphs)),
            line("buffers", self.buffers, "logits, sampler's tables, attention's pieces"),
            *([line("handoff", self.handoff, "slots of KV on its way to other cards")] if self.handoff else []),
            line("KV", self.kv, f"{self.num_blocks} blocks of {self.block_tokens} tokens ({self.block_bytes / 1e6:.2f} MB)"),
            line("reserve", self.reserve),
        ]


def plan_memory(config: ModelConfig, device: DeviceBytes, limits: MemoryLimits, measured: Measured | None = None) -> MemoryPlan:
    """The plan. Raises ConfigError with all figures, and what would fit, where too few blocks are left."""
    measured = Measured() if measured is None else measured
    plan = _divide(config, device, limits, measured)
    needed = _needed_blocks(limits)
    if plan.num_blocks < needed:
        raise ConfigError(_refusal(config, device, limits, plan), code="does_not_fit")
    return plan


def block_bytes(config: ModelConfig, limits: MemoryLimits) -> int:
    """One block of all layers, keys and values."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * limits.block_tokens * limits.dtype_bytes


def weight_bytes(config: ModelConfig, dtype_bytes: int = 2, quantise: Quantise = None) -> int:
    """Of a whole model on the device; in fp8 embeddings, head, norms and the router keep `dtype_bytes`, and so do experts whose gate and up
    would share a scale's block (gpu_build.py)."""
    if quantise is None and not _is_held_fp8(config):
        return config.total_params * dtype_bytes
    attention = 2 * config.hidden * config.head_dim * (config.num_heads + config.num_kv_heads)
    experts = 0 if config.expert_hidden % SCALE_BLOCK else config.num_experts * 3 * config.hidden * config.expert_hidden
    products = config.num_layers * (attention + experts)
    rest = config.total_params - products
    return rest * dtype_bytes + products + products * 4 // (SCALE_BLOCK * SCALE_BLOCK)


def _is_held_fp8(config: ModelConfig) -> bool:
    """Whether the folder's fp8 is what the kernels read: other blocks are made wide as they are loaded (gpu_load.py)."""
    return config.quantisation is not None and config.quantisation.block == (SCALE_BLOCK, SCALE_BLOCK)


def activation_bytes(config: ModelConfig, num_tokens: int, dtype_bytes: int = 2) -> int:
    """Of so many tokens in the widest layer: residual and normed rows, q, k, v and attention's output, or the experts' rows; the larger."""
    rows = 4 * config.hidden
    attention = (3 * config.num_heads + 4 * config.num_kv_heads) * config.head_dim
    experts = config.top_k * (config.expert_hidden + config.hidden) + config.hidden
    routing = 4 * (2 * config.num_experts + 6 * config.top_k)  # float32 logits; weights, ids, order and places
    return num_tokens * ((rows + max(attention, experts)) * dtype_bytes + routing)


def rows_bytes(config: ModelConfig, limits: MemoryLimits) -> int:
    """Of all waves between two pieces: two rows of the model's width for each token (gpu_prefill.GpuBoundaryState)."""
    return 0 if limits.part == "decode" else limits.live_rows * 2 * config.hidden * limits.dtype_bytes


def captured_rows(config: ModelConfig, limits: MemoryLimits) -> int:
    """Rows up to which waves and chunks are captured: all that have a bucket, as far as graphs stay within MAX_WAVE_GRAPH_BYTES.

    The largest buckets are left out first: theirs is the memory pool, and a wave of many rows loses least where it is launched kernel by
    kernel. Refusing instead would keep off a model that runs.
    """
    fitting = [rows for rows in wave_buckets_up_to(limits.most_rows) if wave_graph_bytes(config, limits, rows) <= MAX_WAVE_GRAPH_BYTES]
    return max(fitting, default=wave_buckets_up_to(1)[0])


def wave_graph_bytes(config: ModelConfig, limits: MemoryLimits, rows: int) -> int:
    """Of what is captured for waves: for every bucket up to so many rows layers and what is around them; the sampling of first tokens."""
    buckets = wave_buckets_up_to(rows)
    num_sets = len(buckets) + sum(bucket >= ALONE_MIN_ROWS for bucket in buckets)
    nodes = num_sets * config.num_layers * NODES_PER_WAVE_LAYER + len(buckets) * NODES_AROUND_WAVE + NODES_PER_STEP
    of_rows = 2 * config.hidden * limits.dtype_bytes + config.num_layers * config.top_k * 4
    of_prompts = config.vocab * 4 + LISTED_BYTES + config.num_layers * config.num_experts * 4
    shared = rows * of_rows + MAX_WAVE_PROMPTS * of_prompts
    return nodes * BYTES_PER_NODE + activation_bytes(config, rows, limits.dtype_bytes) + shared


def graph_bytes(config: ModelConfig, limits: MemoryLimits, num_buckets: int) -> int:
    """Of the captured decode steps and layers of short waves: nodes, and the memory pools of both."""
    taken = 0
    if limits.part != "prefill":
        nodes = num_buckets * (config.num_layers * NODES_PER_LAYER + NODES_PER_STEP)
        taken += nodes * BYTES_PER_NODE + activation_bytes(config, limits.max_batch, limits.dtype_bytes) + limits.max_batch * LISTED_BYTES
    if limits.part != "decode":
        taken += wave_graph_bytes(config, limits, captured_rows(config, limits))
    return taken


def buffer_bytes(config: ModelConfig, limits: MemoryLimits) -> int:
    """Of the decode runner: float32 logits, for penalties two tables of tokens seen, masks, biases, for attention every bucket's cut and
    pieces."""
    if limits.part == "prefill":
        return 0  # its sampler's are there before weights are measured
    buckets = buckets_up_to(limits.max_batch)
    logits_and_tables = config.vocab * 4 + config.vocab * 2 + 2 * (config.vocab // 8) + MAX_BIASES * 8
    pieces = (1 + MAX_PIECES) * config.num_heads * config.head_dim * 4
    cuts = sum(buckets) * -(-limits.max_model_tokens // limits.block_tokens) * CUT_BYTES
    return buckets[-1] * (logits_and_tables + pieces) + cuts


def _divide(config: ModelConfig, device: DeviceBytes, limits: MemoryLimits, measured: Measured) -> MemoryPlan:
    def known(value: int | None, estimate: int) -> int:
        return estimate if value is None else value

    weights = known(measured.weights, weight_bytes(config, limits.dtype_bytes, limits.quantise))
    widest = limits.max_batch if limits.part == "decode" else limits.most_rows
    activations = known(measured.activations, activation_bytes(config, widest, limits.dtype_bytes))
    graphs = known(measured.graphs, graph_bytes(config, limits, len(buckets_up_to(limits.max_batch))))
    buffers = buffer_bytes(config, limits)
    reserve = int(device.total * (1 - limits.gpu_memory_fraction))
    taken = device.total - device.free
    rows = rows_bytes(config, limits)
    left = device.total - reserve - taken - weights - activations - rows - graphs - buffers - limits.handoff_bytes
    num_blocks = max(0, left // block_bytes(config, limits))
    return MemoryPlan(
        total=device.total,
        taken=taken,
        weights=weights,
        activations=activations,
        rows=rows,
        graphs=graphs,
        buffers=buffers,
        handoff=limits.handoff_bytes,
        kv=num_blocks * block_bytes(config, limits),
        reserve=reserve,
        num_blocks=num_blocks,
        block_bytes=block_bytes(config, limits),
        block_tokens=limits.block_tokens,
        measured=measured,
    )


def _needed_blocks(limits: MemoryLimits) -> int:
    if limits.part == "prefill":
        return -(-limits.max_model_tokens // limits.block_tokens)
    return max(-(-limits.max_model_tokens // limits.block_tokens), limits.max_batch * MIN_BLOCKS_PER_ROW)


def _refusal(config: ModelConfig, device: DeviceBytes, limits: MemoryLimits, plan: MemoryPlan) -> str:
    needed = _needed_blocks(limits)
    asked = f"{limits.max_model_tokens} tokens of one sequence"
    if limits.part != "prefill":
        asked += f", {limits.max_batch} sequences of {MIN_BLOCKS_PER_ROW} blocks"
    held = plan.weights + plan.activations + plan.rows + plan.graphs + plan.buffers + plan.handoff
    missing = plan.taken + held + plan.reserve + needed * plan.block_bytes - plan.total
    return (
        f"{config.architecture} leaves room for {plan.num_blocks} KV blocks, but {needed} are needed ({asked}): {missing / 1e9:.1f} GB too"
        f" much for {plan.total / 1e9:.1f} GB. " + "; ".join(" ".join(line.split()) for line in plan.lines()) + ". "
        f"What would fit: {_advice(config, device, limits, plan)}"
    )


def _advice(config: ModelConfig, device: DeviceBytes, limits: MemoryLimits, plan: MemoryPlan) -> str:
    found = []
    blocks = plan.num_blocks
    if blocks >= MIN_BLOCKS_PER_ROW:
        tokens, batch = min(limits.max_model_tokens, blocks * limits.block_tokens), min(limits.max_batch, blocks // MIN_BLOCKS_PER_ROW)
        found.append(f"max_model_tokens {tokens}" + ("" if limits.part == "prefill" else f" with max_batch {batch}"))
    if limits.quantise is None and not _is_held_fp8(config):
        by_fp8 = _divide(config, device, replace(limits, quantise="fp8"), replace(plan.measured, weights=None))
        if by_fp8.num_blocks >= _needed_blocks(limits):
            found.append(
                f"--quantize fp8: {by_fp8.weights / 1e9:.1f} GB of weights, {by_fp8.num_blocks} blocks ({by_fp8.num_tokens} tokens)"
            )
    if limits.most_rows > SMALL_WAVE_TOKENS and limits.part != "decode":
        names = [name for name in ("max_wave_tokens", "long_chunk_tokens") if getattr(limits, name) > SMALL_WAVE_TOKENS]
        smaller = replace(
            limits,
            max_wave_tokens=min(limits.max_wave_tokens, SMALL_WAVE_TOKENS),
            long_chunk_tokens=min(limits.long_chunk_tokens, SMALL_WAVE_TOKENS),
        )
        by_waves = _divide(config, device, smaller, replace(plan.measured, activations=None, graphs=None))
        if by_waves.num_blocks >= _needed_blocks(limits):
            found.append(f"{' and '.join(f'{name} {SMALL_WAVE_TOKENS}' for name in names)}: {by_waves.num_blocks} blocks")
    return " or ".join(found) if found else "nothing on this device; a larger one, or several"
