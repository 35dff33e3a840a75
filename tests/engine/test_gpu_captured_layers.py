"""Captured layers of short waves: the same rows as when launched, in any bucket, between the units of other waves.

Without a GPU the graphs' bodies run instead: what they read and write is the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.reference.float64_decoder import float64_run
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_captured_layers import CapturedLimits
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuBoundaryState, GpuPrefill
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_weights import GpuWeights
from duomo_kernels._bounds import error
from tests.models.small_decoders import FAMILIES, Sizes, decoder_bound, small_decoder

TOKENS = torch.randint(3, 100, (2048,), generator=torch.Generator().manual_seed(1)).tolist()
FEW = Sizes(hidden=32, num_heads=2, num_kv_heads=1, num_experts=4, expert_hidden=32)
WIDE = Sizes(num_layers=3, hidden=512, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=16, top_k=4, expert_hidden=384)


@pytest.fixture(scope="module")
def weights() -> GpuWeights:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    return small_decoder("qwen3_moe", dtype=half, device=device, sizes=FEW).weights


def prefill_of(
    weights: GpuWeights, max_tokens: int, *, is_deterministic: bool = False, num_blocks: int = 8, max_rows: int = 32
) -> GpuPrefill:
    """Captured for four sequences of so many tokens each."""
    cache = GpuKvCache(gpu_kv_spec(weights.config, dtype=weights.dtype), num_blocks, weights.device)
    cache.tensor.fill_(torch.nan)  # a key that was not written shows
    prefill = GpuPrefill(GpuDecoder(weights, is_deterministic=is_deterministic), cache)
    prefill.capture(CapturedLimits(max_rows=max_rows, max_sequences=4, max_sequence_tokens=max_tokens))
    assert cache.tensor.isnan().all(), "a capture touches no key"
    return prefill


def part(table: list[int], lo: int, hi: int) -> PromptSlice:
    return PromptSlice(token_ids=TOKENS[lo:hi], start=lo, block_table=table)


def run(prefill: GpuPrefill, *slices: PromptSlice) -> tuple[GpuBoundaryState, Tensor]:
    batch = StepBatch(slices=slices)
    state = prefill.run_layers(0, prefill.decoder.config.num_layers, prefill.begin(batch, keeps_routed=True))
    return state, prefill.logits(state, list(range(batch.num_rows)))


def assert_is_float64s(weights: GpuWeights, logits_TV: Tensor, ids: list[Tensor], num_tokens: int) -> None:
    """The last logits_TV rows of a prompt of so many tokens."""
    limit = decoder_bound(weights.dtype, weights.config.num_layers)
    expected = float64_run(weights, TOKENS[:num_tokens], ids)
    assert not expected.misrouted(limit)
    assert error(logits_TV, expected.logits_TV[-logits_TV.shape[0] :]) <= limit


def test_prompts_prefixes_and_what_was_left_by_others(weights: GpuWeights) -> None:
    prefill = prefill_of(weights, 128)
    assert prefill.captured is not None and prefill.captured.buckets == (16, 64)
    first, logits_TV = run(prefill, part([3], 0, 20), part([5], 0, 4))
    assert_is_float64s(weights, logits_TV[:20], [ids_TK[:20] for ids_TK in first.routed_ids], 20)
    assert_is_float64s(weights, logits_TV[20:], [ids_TK[20:] for ids_TK in first.routed_ids], 4)
    second, logits_TV = run(prefill, part([3], 20, 29))
    ids = [torch.cat((one[:20], two)) for one, two in zip(first.routed_ids, second.routed_ids, strict=True)]
    assert_is_float64s(weights, logits_TV, ids, 29)
    assert first.expert_counts.sum(-1).tolist() == [[40, 40], [8, 8]]


def test_waves_take_turns_between_units(weights: GpuWeights) -> None:
    prefill = prefill_of(weights, 128)
    state, other = (prefill.begin(StepBatch(slices=(part([table], 0, num),)), keeps_routed=True) for table, num in ((3, 9), (5, 17)))
    prefill.run_layers(0, 1, state)
    prefill.run_layers(0, 1, other)
    prefill.run_layers(1, 2, state)
    prefill.run_layers(1, 2, other)
    for each, num_tokens in ((state, 9), (other, 17)):
        assert_is_float64s(weights, prefill.logits(each, [num_tokens - 1]), each.routed_ids, num_tokens)


def test_what_is_not_counted_yet_outlives_other_waves(weights: GpuWeights) -> None:
    """A wave of one chunk is counted when somebody asks: here in the middle, and while another wave's rows lie in the graphs' tensors."""
    prefill = prefill_of(weights, 128)
    others = [PromptSlice(token_ids=TOKENS[at : at + 17], start=0, block_table=[table]) for at, table in ((100, 5), (200, 6))]
    first, other, third = (StepBatch(slices=tuple(slices)) for slices in ((part([3], 0, 30), part([2], 0, 7)), others[:1], others[1:]))
    expected = [prefill.run(batch)[0].expert_use() for batch in (first, other)]
    states = [prefill.begin(batch) for batch in (first, other)]
    halves = []
    for layer in range(2):
        for state in states:
            prefill.run_layers(layer, layer + 1, state)
            prefill.run_layers(0, 1, prefill.begin(third))  # the same layer's ids lie where the others' did
        halves.append(states[0].expert_counts)
    assert torch.equal(halves[0][:, 0], expected[0].counts_SLE[:, 0]) and not halves[0][:, 1].any()
    for state, use in zip(states, expected, strict=True):
        found = state.expert_use()
        assert torch.equal(found.counts_SLE, use.counts_SLE) and found.bytes_read == use.bytes_read > 0
    assert expected[0].counts_SLE.sum(-1).tolist() == [[60, 60], [14, 14]]


def test_larger_waves_are_launched(weights: GpuWeights) -> None:
    prefill = prefill_of(weights, 64 * 16)
    captured = prefill.captured
    assert captured is not None

    def bucket(*lengths: int, table: int = 1) -> int | None:
        slices = tuple(PromptSlice(token_ids=TOKENS[:length], start=0, block_table=[0] * table) for length in lengths)
        return captured.bucket_of(StepBatch(slices=slices))

    assert [bucket(1), bucket(16), bucket(17), bucket(50, 14)] == [16, 16, 64, 64]
    assert bucket(65) is None and bucket(1, 1, 1, 1, 1) is None
    long = PromptSlice(token_ids=TOKENS[:1], start=64 * 16, block_table=[0] * 17)
    assert captured.bucket_of(StepBatch(slices=(long,))) is None
    state, logits_TV = run(prefill, part([2, 6], 0, 65))
    assert_is_float64s(weights, logits_TV, state.routed_ids, 65)


def test_deterministic_rows_are_those_that_were_launched(weights: GpuWeights) -> None:
    prefill = prefill_of(weights, 128, is_deterministic=True)
    _, replayed = run(prefill, part([3], 0, 7), part([5], 0, 12))
    prefill.captured = None
    _, launched = run(prefill, part([5], 0, 12))
    assert torch.equal(replayed[7:], launched)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_wider_waves_replayed(family: str) -> None:
    weights = small_decoder(family, dtype=torch.bfloat16, device=torch.device("cuda"), sizes=WIDE).weights
    prefill = prefill_of(weights, 2048, num_blocks=128, max_rows=2048)
    tables = torch.randperm(128).view(4, 32).tolist()
    for lengths in ([1], [16], [17, 3], [300], [1024], [1, 700, 63], [1030, 1000], [2048], [5]):
        state, logits_TV = run(prefill, *(part(table, 0, length) for table, length in zip(tables, lengths, strict=False)))
        row = 0
        for length in lengths:
            rows = slice(row, row + length)
            assert_is_float64s(weights, logits_TV[rows], [ids_TK[rows] for ids_TK in state.routed_ids], length)
            row += length
    first, _ = run(prefill, part(tables[3], 0, 500))
    second, logits_TV = run(prefill, part(tables[0], 0, 70), part(tables[3], 500, 1000))
    ids = [torch.cat((one, two[70:])) for one, two in zip(first.routed_ids, second.routed_ids, strict=True)]
    assert_is_float64s(weights, logits_TV[70:], ids, 1000)


@pytest.mark.gpu
def test_deterministic_bits_replayed_and_launched() -> None:
    weights = small_decoder("qwen3_moe", dtype=torch.bfloat16, device=torch.device("cuda"), sizes=WIDE).weights
    prefill = prefill_of(weights, 2048, is_deterministic=True, num_blocks=64, max_rows=2048)
    captured, tables = prefill.captured, torch.randperm(64).view(2, 32).tolist()
    for length in (1, 33, 500, 1500):
        prefill.captured = captured
        _, replayed = run(prefill, part(tables[0], 0, 70), part(tables[1], 0, length))
        prefill.captured = None
        _, launched = run(prefill, part(tables[1], 0, length))
        assert torch.equal(replayed[70:], launched), length
