"""Waves on the GPU's engine: mixed prompts, cached prefixes, units, counts; the CPU engine's tokens where numbers are float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench.reference.float64_decoder import float64_run
from duomo.engine import gpu_wave_attention
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuBoundaryState, GpuPrefill
from duomo.engine.gpu_wave import upload_wave
from duomo.engine.monolith import GenerateRequest, generate
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_load import load_gpu_weights
from duomo.models.gpu_weights import GpuWeights
from duomo.models.qwen3_moe import Model
from duomo.wire.values import Sampling
from duomo_kernels import _prefill_library
from duomo_kernels._bounds import error
from tests.models.small_decoders import FAMILIES, Sizes, decoder_bound, small_decoder

TINY_MOE = Path(__file__).parents[2] / "models" / "tiny-moe"
TOKENS = torch.randint(3, 100, (100,), generator=torch.Generator().manual_seed(1)).tolist()
FEW = Sizes(hidden=32, num_heads=2, num_kv_heads=1, num_experts=4, expert_hidden=32)
TABLES = {"a": [5, 2, 9], "b": [0, 1, 7], "c": [3, 4, 8]}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def half(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16


@pytest.fixture(scope="module")
def weights(device: torch.device, half: torch.dtype) -> GpuWeights:
    return small_decoder("qwen3_moe", dtype=half, device=device, sizes=FEW).weights


@pytest.fixture(scope="module")
def dense(device: torch.device, half: torch.dtype) -> GpuWeights:
    return small_decoder("llama", dtype=half, device=device, sizes=FEW).weights


def prefill_of(weights: GpuWeights, *, is_deterministic: bool = False, block_tokens: int = 16) -> GpuPrefill:
    cache = GpuKvCache(gpu_kv_spec(weights.config, block_tokens=block_tokens, dtype=weights.dtype), 10, weights.device)
    cache.tensor.fill_(torch.nan)  # a key that was not written shows
    return GpuPrefill(GpuDecoder(weights, is_deterministic=is_deterministic), cache)


def part(name: str, lo: int, hi: int) -> PromptSlice:
    return PromptSlice(token_ids=TOKENS[lo:hi], start=lo, block_table=TABLES[name])


def run(prefill: GpuPrefill, *slices: PromptSlice) -> tuple[GpuBoundaryState, Tensor]:
    """The state and the logits of every row."""
    batch = StepBatch(slices=slices)
    state = prefill.run_layers(0, prefill.decoder.config.num_layers, prefill.begin(batch, keeps_routed=True))
    return state, prefill.logits(state, list(range(batch.num_rows)))


def assert_is_float64s(weights: GpuWeights, logits_TV: Tensor, ids: list[Tensor], token_ids: list[int]) -> None:
    """The last logits_TV rows of the prompt, whose experts (of all of its rows) are given."""
    limit = decoder_bound(weights.dtype, weights.config.num_layers)
    expected = float64_run(weights, token_ids, ids)
    assert not expected.misrouted(limit)
    assert error(logits_TV, expected.logits_TV[-logits_TV.shape[0] :]) <= limit


def test_a_wave_of_mixed_prompts(weights: GpuWeights) -> None:
    state, logits_TV = run(prefill_of(weights), part("a", 0, 17), part("b", 0, 1), part("c", 0, 33))
    for lo, hi in ((0, 17), (17, 18), (18, 51)):
        assert_is_float64s(weights, logits_TV[lo:hi], [ids_TK[lo:hi] for ids_TK in state.routed_ids], TOKENS[: hi - lo])


@pytest.mark.parametrize("cut", [16, 21])
def test_a_cached_prefix_and_its_rest_are_the_whole(weights: GpuWeights, cut: int) -> None:
    prefill = prefill_of(weights)
    first, _ = run(prefill, part("b", 0, cut))
    second, logits_TV = run(prefill, part("a", 0, 5), part("b", cut, 33), part("c", 0, 2))
    rows = slice(5, 5 + 33 - cut)
    ids = [torch.cat((one, two[rows])) for one, two in zip(first.routed_ids, second.routed_ids, strict=True)]
    assert_is_float64s(weights, logits_TV[rows], ids, TOKENS[:33])


def test_a_dense_model(dense: GpuWeights) -> None:
    state, logits_TV = run(prefill_of(dense), part("a", 0, 9))
    assert_is_float64s(dense, logits_TV, state.routed_ids, TOKENS[:9])
    assert state.expert_counts.tolist() == [[[9]] * 2]


def test_units_change_no_bit(weights: GpuWeights) -> None:
    whole_prefill, cut_prefill = prefill_of(weights), prefill_of(weights)
    _, whole = run(whole_prefill, part("a", 0, 17))
    batch = StepBatch(slices=(part("a", 0, 17),))
    state = cut_prefill.begin(batch)
    other = cut_prefill.begin(StepBatch(slices=(part("b", 0, 3),)))  # another wave between two units
    state = cut_prefill.run_layers(0, 1, state)
    cut_prefill.run_layers(0, 2, other)
    state = cut_prefill.run_layers(1, 2, state)
    assert torch.equal(cut_prefill.logits(state, list(range(17))), whole)
    assert torch.equal(cut_prefill.logits(state, batch.last_rows), cut_prefill.logits(state, batch.last_rows))
    assert torch.equal(cut_prefill.cache.tensor[:, [5, 2]].nan_to_num(), whole_prefill.cache.tensor[:, [5, 2]].nan_to_num())


def test_layers_run_in_order(weights: GpuWeights) -> None:
    prefill = prefill_of(weights)
    state = prefill.begin(StepBatch(slices=(part("a", 0, 3),)))
    with pytest.raises(AssertionError):
        prefill.run_layers(1, 2, state)
    with pytest.raises(AssertionError):
        prefill.logits(state, [0])


def test_counts_and_no_rows(weights: GpuWeights) -> None:
    prefill = prefill_of(weights)
    state = prefill.run_layers(0, 1, prefill.begin(StepBatch(slices=(part("a", 0, 17), part("b", 0, 2))), keeps_routed=True))
    counts, ids_TK = state.expert_counts, state.routed_ids[0].cpu()
    assert counts.shape == (2, 2, 4) and counts.dtype == torch.int32 and counts.device.type == "cpu"
    assert torch.equal(counts[0, 0], torch.bincount(ids_TK[:17].flatten(), minlength=4))
    assert torch.equal(counts[1, 0], torch.bincount(ids_TK[17:].flatten(), minlength=4))
    assert not counts[:, 1].any(), "a layer that has not run"
    assert prefill.logits(prefill.run_layers(1, 2, state), []).shape == (0, 100)


def test_deterministic_prompts_know_neither_company_nor_cuts(weights: GpuWeights) -> None:
    """Cuts at whole blocks of 64: where prefixes are cached."""
    long = PromptSlice(token_ids=TOKENS[:70], start=0, block_table=[4, 2])
    _, alone = run(prefill_of(weights, block_tokens=64, is_deterministic=True), long)
    prefill = prefill_of(weights, block_tokens=64, is_deterministic=True)
    _, among = run(prefill, PromptSlice(token_ids=TOKENS[:3], start=0, block_table=[1]), long)
    assert torch.equal(among[3:], alone)
    rest = PromptSlice(token_ids=TOKENS[64:70], start=64, block_table=[4, 2])
    _, cut = run(prefill, PromptSlice(token_ids=TOKENS[:7], start=0, block_table=[0]), rest)
    assert torch.equal(cut[7:], alone[64:])


def test_the_library_is_given_lengths_that_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_wave_attention, "choose_way", lambda *_, **__: "cudnn")

    def suits(*lengths: int) -> bool:
        slices = tuple(PromptSlice(token_ids=[1] * length, start=0, block_table=[0] * 128) for length in lengths)
        wave = upload_wave(StepBatch(slices=slices), 16, torch.device("cpu"))
        return gpu_wave_attention.suits_library(torch.empty(0), wave)

    assert suits(1024) and suits(1025) and suits(1280, 1280)
    assert not suits(1023) and not suits(1025, 1025) and not suits(1024, 1280) and not suits(512, 512)


@pytest.mark.parametrize("lengths", [[33], [32, 32]])
def test_the_library_is_given_whole_steps(weights: GpuWeights, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's plain products in cuDNN's place."""
    monkeypatch.setattr(_prefill_library, "BACKEND", SDPBackend.MATH)
    monkeypatch.setattr(gpu_wave_attention, "LIBRARY_STEP", 32)
    monkeypatch.setattr(gpu_wave_attention, "suits_library", lambda *_: True)
    calls: list[int] = []
    equal_attention = _prefill_library.equal_attention

    def counted(q_THD: Tensor, *arguments: object, **named: object) -> Tensor:
        calls.append(q_THD.shape[0])
        return equal_attention(q_THD, *arguments, **named)  # type: ignore[arg-type]  # only handed on

    monkeypatch.setattr("duomo_kernels.prefill_attention.equal_attention", counted)
    slices = [part(name, 0, length) for name, length in zip("ab", lengths, strict=False)]
    state, logits_TV = run(prefill_of(weights), *slices)
    assert calls == [64, 64]
    row = 0
    for length in lengths:
        rows = slice(row, row + length)
        assert_is_float64s(weights, logits_TV[rows], [ids_TK[rows] for ids_TK in state.routed_ids], TOKENS[:length])
        row += length


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_wider_waves_in_bf16(family: str) -> None:
    sizes = Sizes(num_layers=4, hidden=512, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=16, top_k=4, expert_hidden=384)
    device = torch.device("cuda")
    weights = small_decoder(family, dtype=torch.bfloat16, device=device, sizes=sizes).weights
    tokens = torch.randint(3, 100, (2000,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = GpuKvCache(gpu_kv_spec(weights.config, dtype=weights.dtype), 80, device)
    cache.tensor.fill_(torch.nan)
    prefill, tables = GpuPrefill(GpuDecoder(weights), cache), torch.randperm(80).view(4, 20).tolist()

    def sliced(at: int, lo: int, hi: int) -> PromptSlice:
        return PromptSlice(token_ids=tokens[lo:hi], start=lo, block_table=tables[at])

    for lengths in ([1], [8], [300], [1024, 1024], [1100], [1, 700, 63]):
        state, logits_TV = run(prefill, *(sliced(at, 0, length) for at, length in enumerate(lengths)))
        row = 0
        for length in lengths:
            rows = slice(row, row + length)
            assert_is_float64s(weights, logits_TV[rows], [ids_TK[rows] for ids_TK in state.routed_ids], tokens[:length])
            row += length
    first, _ = run(prefill, sliced(3, 0, 500))
    second, logits_TV = run(prefill, sliced(0, 0, 70), sliced(3, 500, 1000))
    ids = [torch.cat((one, two[70:])) for one, two in zip(first.routed_ids, second.routed_ids, strict=True)]
    assert_is_float64s(weights, logits_TV[70:], ids, tokens[:1000])


def tiny_greedy(prompts: list[list[int]], num_tokens: int, *, is_deterministic: bool = False) -> list[list[int]]:
    """Of the embedded model, dequantised to float32: a prompt as one wave, then one token a wave over what is cached; side by side."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = load_gpu_weights(TINY_MOE, device=device, dtype=torch.float32)
    cache = GpuKvCache(gpu_kv_spec(weights.config, dtype=torch.float32), 6 * len(prompts), device)
    prefill = GpuPrefill(GpuDecoder(weights, is_deterministic=is_deterministic), cache)
    tables = [list(range(6 * at, 6 * at + 6)) for at in range(len(prompts))]
    given, starts = prompts, [0] * len(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        slices = tuple(PromptSlice(token_ids=ids, start=s, block_table=t) for ids, s, t in zip(given, starts, tables, strict=True))
        _, logits_SV = prefill.run(StepBatch(slices=slices))
        starts = [each.end for each in slices]
        given = [[int(token)] for token in logits_SV.argmax(-1)]
        for output, ids in zip(outputs, given, strict=True):
            output += ids
    return outputs


def cpu_greedy(model: Model, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    answers = generate(model, [GenerateRequest(prompt_ids=ids, sampling=sampling) for ids in prompts])
    return [[token.token_id for token in tokens] for tokens in answers]


def tiny_prompts(*lengths: int) -> list[list[int]]:
    """No call among those of the test below is closer than 4e-5 of the logits' length: far more than float32 rounds."""
    made = torch.Generator().manual_seed(4)
    return [torch.randint(3, 8192, (length,), generator=made).tolist() for length in lengths]


@pytest.mark.gpu
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_greedy_tokens_of_the_embedded_model_equal_the_cpus(model: Model, is_deterministic: bool) -> None:
    """Without TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    prompts = tiny_prompts(1, 2, 17, 63, 64, 257)
    assert tiny_greedy(prompts, 24, is_deterministic=is_deterministic) == cpu_greedy(model, prompts, 24)


@pytest.mark.slow
def test_two_greedy_tokens_of_the_embedded_model_equal_the_cpus(model: Model) -> None:
    prompts = tiny_prompts(1, 2)
    assert tiny_greedy(prompts, 2) == cpu_greedy(model, prompts, 2)
