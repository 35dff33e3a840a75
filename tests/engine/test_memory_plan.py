"""The division of a GPU's memory, on the shapes of published models and an 80 GB card."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duomo.config import PrefillSection
from duomo.engine.memory_plan import (
    MAX_WAVE_GRAPH_BYTES,
    DeviceBytes,
    Measured,
    MemoryLimits,
    MemoryPlan,
    activation_bytes,
    captured_rows,
    plan_memory,
    wave_graph_bytes,
    weight_bytes,
)
from duomo.engine.wave_buckets import WAVE_BUCKETS
from duomo.errors import ConfigError
from duomo.models.config import Fp8Blocks, ModelConfig
from services.prefill.snapshot import Limits
from tests.engine.published import MIXTRAL, OLMOE, QWEN3_30B

GB = 10**9
H100 = DeviceBytes(total=85_030_000_000, free=84_400_000_000)  # 79.2 GiB, a CUDA context taken off
LIMITS = MemoryLimits(max_batch=64, max_wave_tokens=8192, max_model_tokens=4096)


def total_of(plan: MemoryPlan) -> int:
    return plan.taken + plan.weights + plan.activations + plan.rows + plan.graphs + plan.buffers + plan.kv + plan.reserve


@pytest.mark.parametrize(("config", "low_gb", "high_gb"), [(OLMOE, 13.7, 14.0), (QWEN3_30B, 60.9, 61.2), (MIXTRAL, 93.2, 93.6)])
def test_weights_of_published_models(config: ModelConfig, low_gb: float, high_gb: float) -> None:
    assert low_gb * GB < weight_bytes(config) < high_gb * GB
    assert weight_bytes(config) == 2 * config.total_params
    assert 0.5 < weight_bytes(config, 2, "fp8") / weight_bytes(config) < 0.56


def test_fp8_counts_for_what_the_kernels_read_in_fp8() -> None:
    held = replace(OLMOE, quantisation=Fp8Blocks(block=(128, 128)))
    assert weight_bytes(held) == weight_bytes(OLMOE, 2, "fp8")
    assert weight_bytes(replace(OLMOE, quantisation=Fp8Blocks(block=(64, 64)))) == weight_bytes(OLMOE)
    narrow = replace(OLMOE, expert_hidden=1000)  # gate and up would share a scale's block: experts stay wide
    attention = 16 * 2 * 2048 * 128 * (16 + 16)
    assert weight_bytes(narrow) - weight_bytes(narrow, 2, "fp8") == attention - attention * 4 // 128**2


def test_olmoe_fits_with_room() -> None:
    plan = plan_memory(OLMOE, H100, replace(LIMITS, max_batch=256))
    assert plan.block_bytes == 64 * 128 * 1024  # 128 KiB a token
    assert 300_000 < plan.num_tokens < 500_000
    assert 0 <= plan.total - total_of(plan) < plan.block_bytes  # every byte has a name, but for less than a block


def test_qwen3_leaves_about_14_gb_for_kv() -> None:
    plan = plan_memory(QWEN3_30B, H100, LIMITS)
    assert 12 * GB < plan.kv < 15 * GB
    assert plan.block_bytes == 64 * 96 * 1024
    assert plan.num_tokens > 64 * 1024  # what is measured: 64 sequences of 1k


def test_mixtral_is_refused_in_bf16_and_fits_in_fp8() -> None:
    with pytest.raises(ConfigError) as refused:
        plan_memory(MIXTRAL, H100, LIMITS)
    said = refused.value.detail
    assert refused.value.code == "does_not_fit"
    for figure in ("weights 93.41 GB", "for 85.0 GB", "128 are needed", "--quantize fp8: 47.0 GB of weights"):
        assert figure in said, said
    plan = plan_memory(MIXTRAL, H100, replace(LIMITS, quantise="fp8"))
    assert plan.num_tokens > 100_000


def test_a_long_context_is_refused_and_told_what_would_fit() -> None:
    small = DeviceBytes(total=20 * GB, free=20 * GB)
    with pytest.raises(ConfigError, match="max_model_tokens [0-9]+ with max_batch 64") as refused:
        plan_memory(OLMOE, small, replace(LIMITS, max_model_tokens=131072))
    fitting = int(refused.value.detail.split("max_model_tokens ")[1].split()[0])
    assert plan_memory(OLMOE, small, replace(LIMITS, max_model_tokens=fitting)).num_tokens >= fitting


def test_smaller_waves_are_proposed_by_the_names_that_are_too_large() -> None:
    tight, limits = DeviceBytes(total=16 * GB, free=16 * GB), replace(LIMITS, max_wave_tokens=65536, gpu_memory_fraction=0.99)
    with pytest.raises(ConfigError, match="or max_wave_tokens 2048 and long_chunk_tokens 2048: [0-9]+ blocks"):
        plan_memory(OLMOE, tight, limits)
    with pytest.raises(ConfigError, match="or max_wave_tokens 2048: [0-9]+ blocks"):
        plan_memory(OLMOE, tight, replace(limits, long_chunk_tokens=1024))
    with pytest.raises(ConfigError) as refused:
        plan_memory(OLMOE, tight, replace(limits, max_wave_tokens=1024, long_chunk_tokens=1024, max_model_tokens=65536))
    assert "max_wave_tokens" not in refused.value.detail and "long_chunk_tokens" not in refused.value.detail


def test_a_long_prompt_costs_a_chunk_and_its_rows() -> None:
    """Not its activations: those of 128k tokens would not fit beside the weights."""
    short = plan_memory(OLMOE, H100, replace(LIMITS, max_wave_tokens=2048))
    limits = replace(LIMITS, max_wave_tokens=2048, max_model_tokens=131072)
    long = plan_memory(OLMOE, H100, limits)
    assert (limits.most_rows, limits.live_rows) == (8192, 131072 + 4096)
    assert long.activations == activation_bytes(OLMOE, 8192) and short.activations == activation_bytes(OLMOE, 4096)
    assert long.rows == limits.live_rows * 2 * OLMOE.hidden * 2 and long.rows < 1.2 * GB
    assert 10 * long.activations < activation_bytes(OLMOE, 131072)
    assert 0 <= long.total - total_of(long) < long.block_bytes


@pytest.mark.parametrize("longest", [100, 4096, 131072])
def test_the_policy_keeps_no_more_rows_alive_than_are_planned(longest: int) -> None:
    """Two packages that do not know each other: the bound is said in both."""
    section = PrefillSection(max_wave_tokens=1000)
    kept = Limits.of(section, num_groups=4, num_blocks=4000, max_prompt_tokens=longest)
    planned = MemoryLimits(max_batch=1, max_wave_tokens=1000, max_model_tokens=longest)
    assert kept.max_live_tokens == planned.live_rows
    assert planned.long_chunk_tokens == section.long_chunk_tokens
    assert all(rows <= planned.most_rows for rows in range(1, longest + 1, 99) if kept.chunk_tokens_of(rows) is None)
    assert kept.long_chunk_tokens <= planned.most_rows or longest <= planned.most_rows


def test_only_what_prefills_holds_rows_between_pieces() -> None:
    assert plan_memory(OLMOE, H100, replace(LIMITS, part="decode")).rows == 0
    assert plan_memory(OLMOE, H100, replace(LIMITS, part="prefill")).rows == plan_memory(OLMOE, H100, LIMITS).rows > 0


@pytest.mark.parametrize("config", [OLMOE, QWEN3_30B, MIXTRAL])
def test_graphs_of_waves_stay_within_two_gigabytes(config: ModelConfig) -> None:
    """Of published models every bucket does; of one far wider the largest buckets are left out, never all."""
    assert len(WAVE_BUCKETS) <= 12 and 512 in WAVE_BUCKETS
    assert captured_rows(config, LIMITS) == WAVE_BUCKETS[-1]
    assert wave_graph_bytes(config, LIMITS, WAVE_BUCKETS[-1]) < MAX_WAVE_GRAPH_BYTES
    wide = replace(config, hidden=64 * config.hidden, expert_hidden=64 * config.expert_hidden)
    rows = captured_rows(wide, LIMITS)
    assert rows in WAVE_BUCKETS[:-1] and wave_graph_bytes(wide, LIMITS, rows) <= MAX_WAVE_GRAPH_BYTES
    assert captured_rows(replace(config, num_layers=100_000), LIMITS) == WAVE_BUCKETS[0]
    assert captured_rows(config, replace(LIMITS, max_wave_tokens=100, long_chunk_tokens=100)) == 128


def test_nothing_fits_a_small_card() -> None:
    with pytest.raises(ConfigError, match="nothing on this device"):
        plan_memory(QWEN3_30B, DeviceBytes(total=16 * GB, free=16 * GB), LIMITS)


def test_what_was_measured_counts() -> None:
    estimated = plan_memory(OLMOE, H100, LIMITS)
    measured = plan_memory(OLMOE, H100, LIMITS, Measured(weights=20 * GB, activations=3 * GB, graphs=GB))
    assert (measured.weights, measured.activations, measured.graphs) == (20 * GB, 3 * GB, GB)
    assert measured.kv < estimated.kv
    assert "estimated" in "".join(estimated.lines()) and "estimated" not in "".join(measured.lines())


def test_what_others_hold_is_taken_off() -> None:
    shared = replace(H100, free=H100.free - 10 * GB)
    assert plan_memory(OLMOE, H100, LIMITS).kv - plan_memory(OLMOE, shared, LIMITS).kv == pytest.approx(10 * GB, abs=2 * 8_388_608)


def test_activations_grow_with_the_wave_and_hold_every_expert_row() -> None:
    assert activation_bytes(OLMOE, 16384) == 2 * activation_bytes(OLMOE, 8192)
    routed_rows = 8192 * OLMOE.top_k * (OLMOE.expert_hidden + OLMOE.hidden) * 2
    assert routed_rows < activation_bytes(OLMOE, 8192) < 2 * routed_rows


def test_lines_name_every_use() -> None:
    lines = plan_memory(QWEN3_30B, H100, LIMITS).lines()
    assert [line.split()[0] for line in lines] == [
        "device",
        "taken",
        "weights",
        "activations",
        "rows",
        "graphs",
        "buffers",
        "KV",
        "reserve",
    ]
    assert all("GB" in line for line in lines)
