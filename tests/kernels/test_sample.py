"""The sampler on the device against the CPU's, token for token, and against its own reference in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

pytest.importorskip("msgspec", reason="the engine, whose sampler is compared with, needs msgspec")

from duomo.engine.randomness import uniform
from duomo.engine.sampler import RowSampling, Sampler
from duomo.wire.values import Sampling
from duomo_kernels._sampling import (
    INFINITE_FLAG,
    MODE_FLAG,
    NAN_FLAG,
    Penalties,
    SampleRows,
    draw_below,
    empty_biases,
    empty_masks,
    empty_tables,
    fill_slot,
    from_order,
    order,
)
from duomo_kernels.sample import EDGE, Mode, SampleTiles, misplaced, sample, sample_reference

SMALL = SampleTiles(chunk=256, tile=512, pivots=8, capacity=256, block=128)
KINDS: dict[str, tuple[Mode, dict[str, float]]] = {
    "greedy": ("greedy", {"temperature": 0.0}),
    "plain": ("plain", {"temperature": 0.75}),
    "top_k": ("limited", {"top_k": 40}),
    "top_p": ("limited", {"top_p": 0.9, "temperature": 1.5}),
    "min_p": ("limited", {"min_p": 0.0625}),
    "all": ("limited", {"top_k": 60, "top_p": 0.75, "min_p": 0.001, "temperature": 0.5}),
    "deep": ("limited", {"top_k": 5000, "top_p": 0.9375}),
    "one": ("limited", {"top_k": 1}),
    "nearly_none": ("limited", {"top_p": 2.0**-20}),
}


def rows_of(num: int, device: torch.device, num_valid: int | None = None, **values: float) -> SampleRows:
    """Rows that ask for the same, each with its own seed, choice and position."""
    of = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | values
    generator = torch.Generator().manual_seed(7)
    floats = {f"{name}_S": torch.full((num,), float(of[name]), device=device) for name in ("temperature", "top_p", "min_p")}
    return SampleRows(
        **floats,
        top_k_S=torch.full((num,), int(of["top_k"]), dtype=torch.int32, device=device),
        seed_S=torch.randint(-(2**62), 2**62, (num,), generator=generator).to(device),
        choice_S=torch.randint(0, 9, (num,), generator=generator).int().to(device),
        position_S=torch.randint(0, 99999, (num,), generator=generator).int().to(device),
        num_valid=torch.tensor([num if num_valid is None else num_valid], dtype=torch.int32, device=device),
    )


def outputs(num: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Poison: values that no kernel writes."""
    poison = torch.full((2, num), -77, dtype=torch.int32, device=device)
    return poison[0], poison[1]


def cpu_tokens(logits_SV: Tensor, rows: SampleRows) -> Tensor:
    """What the CPU's sampler takes; a prompt as long as the position."""
    asked = [
        RowSampling(
            sampling=Sampling(
                max_tokens=1,
                temperature=float(rows.temperature_S[row]),
                top_k=int(rows.top_k_S[row]),
                top_p=float(rows.top_p_S[row]),
                min_p=float(rows.min_p_S[row]),
                seed=int(rows.seed_S[row]),
            ),
            choice=int(rows.choice_S[row]),
            prompt_ids=range(int(rows.position_S[row])),
            output_ids=(),
        )
        for row in range(logits_SV.shape[0])
    ]
    return torch.tensor([one.token_id for one in Sampler().sample(logits_SV.float().cpu(), asked)], dtype=torch.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 63, 300])
def test_takes_the_token_of_the_cpu(kind: str, vocab: int, device: torch.device) -> None:
    mode, asked = KINDS[kind]
    generator = torch.Generator().manual_seed(vocab)
    logits_SV = torch.randn(3, vocab, generator=generator) * torch.tensor([[0.5], [2.0], [6.0]])
    rows = rows_of(3, device, None, **asked)
    token_S, flag_S = sample(logits_SV.to(device), rows, mode=mode, out=outputs(3, device), tiles=SMALL)
    assert flag_S.tolist() == [0] * 3
    assert token_S.tolist() == cpu_tokens(logits_SV, rows).tolist() == sample_reference(logits_SV, rows)[0].tolist()
    assert misplaced(token_S, logits_SV, rows) <= EDGE


def test_mixed_rows_in_bf16_and_each_alone(device: torch.device) -> None:
    """bf16 logits tie often: edges fall among equal values. A row's token is the same alone, in a batch, and with padding."""
    logits_SV = (torch.randn(len(KINDS), 257, generator=torch.Generator().manual_seed(1)) * 2).bfloat16().to(device)
    rows = rows_of(len(KINDS), device)
    for at, (_, asked) in enumerate(KINDS.values()):
        for name, value in asked.items():
            getattr(rows, f"{name}_S")[at] = value
    token_S, flag_S = sample(logits_SV, rows, tiles=SMALL)
    assert flag_S.count_nonzero() == 0 and misplaced(token_S, logits_SV, rows) <= EDGE
    assert token_S.tolist() == cpu_tokens(logits_SV, rows).tolist()
    for at in range(1, 4):
        fields = {field.name: getattr(rows, field.name)[at : at + 1].clone() for field in dataclasses.fields(rows)[:-1]}
        alone = SampleRows(**fields, num_valid=torch.ones(1, dtype=torch.int32, device=device))
        assert sample(logits_SV[at : at + 1].clone(), alone, tiles=SMALL)[0].item() == token_S[at].item()


@pytest.mark.parametrize("capacity", [16, 512])
def test_ties_fall_to_the_lower_ids(capacity: int, device: torch.device) -> None:
    """All equal, and two levels whose upper is cut: whether the ties fit into the list or send the row through its logits again."""
    logits_SV = torch.zeros(4, 300)
    logits_SV[2:, ::2] = 1.0
    rows = rows_of(4, device)
    rows.top_k_S[:] = torch.tensor([7, 0, 20, 200])
    rows.top_p_S[:] = torch.tensor([1.0, 0.5, 0.75, 0.875])
    token_S, _ = sample(logits_SV.to(device), rows, tiles=dataclasses.replace(SMALL, capacity=capacity))
    assert misplaced(token_S, logits_SV, rows) <= EDGE and int(token_S[0]) < 7 and int(token_S[1]) < 150
    assert token_S.tolist() == cpu_tokens(logits_SV, rows).tolist()


@triton.jit
def _draw_body(draw, out, total):
    row = tl.program_id(0)
    tl.store(out + row, draw_below(draw, row, total + tl.zeros((), tl.int64)))


def test_draws_the_numbers_of_the_cpu_bit_for_bit(device: torch.device) -> None:
    rows = rows_of(16, device)
    rows.seed_S[:3] = torch.tensor([0, -1, 2**63 - 1])
    out_S = torch.zeros(16, dtype=torch.int64, device=device)
    _draw_body[(16,)](rows.arguments(), out_S, 1 << 60)
    numbers = [uniform(*(int(of[row]) for of in (rows.seed_S, rows.choice_S, rows.position_S))) for row in range(16)]
    assert out_S.tolist() == [int(number * 2**53) << 7 for number in numbers]


@triton.jit
def _order_body(x, key, back, NUM: tl.constexpr):
    at = tl.arange(0, NUM)
    value = order(tl.load(x + at))
    tl.store(key + at, value)
    tl.store(back + at, from_order(value))


def test_order_is_that_of_floats(device: torch.device) -> None:
    x_N = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 2.5, torch.inf], device=device)
    key_N, back_N = torch.zeros(8, dtype=torch.int32, device=device), torch.zeros(8, device=device)
    _order_body[(1,)](x_N, key_N, back_N, NUM=8)
    assert key_N.tolist() == sorted(set(key_N.tolist())) and torch.equal(back_N, x_N)


def test_rows_without_an_answer_are_flagged_and_padding_is_left_alone(device: torch.device) -> None:
    logits_SV = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    logits_SV[0, 299] = torch.nan
    logits_SV[1] = -torch.inf
    logits_SV[2, 5] = torch.inf
    logits_SV[3, :299] = -torch.inf
    logits_SV[5] = torch.nan
    modes: list[tuple[Mode, dict[str, float]]] = [("greedy", {"temperature": 0.0}), ("plain", {}), ("limited", {"top_k": 4, "top_p": 0.5})]
    for mode, asked in modes:
        rows = rows_of(6, device, 5, **asked)
        token_S, flag_S = sample(logits_SV.to(device), rows, mode=mode, out=outputs(6, device), tiles=SMALL)
        assert flag_S.tolist() == [NAN_FLAG.value, INFINITE_FLAG.value, INFINITE_FLAG.value, 0, 0, -77]
        assert token_S[:4].tolist() == [-1, -1, -1, 299] and 0 <= int(token_S[4]) < 300 and int(token_S[5]) == -77
        assert torch.equal(flag_S[:5].cpu(), sample_reference(logits_SV, rows)[1][:5])


def test_a_row_that_asks_for_more_than_the_mode_is_flagged(device: torch.device) -> None:
    logits_SV = torch.randn(2, 63, device=device)
    modes: list[tuple[Mode, dict[str, float]]] = [("greedy", {"temperature": 1.0}), ("plain", {"top_k": 3}), ("plain", {"min_p": 0.5})]
    for mode, asked in modes:
        token_S, flag_S = sample(logits_SV, rows_of(2, device, None, **asked), mode=mode, tiles=SMALL)
        assert token_S.tolist() == [-1, -1] and flag_S.tolist() == [MODE_FLAG.value] * 2


def test_frequencies_follow_the_distribution(device: torch.device) -> None:
    num = 50000 if device.type == "cuda" else 64  # a grid has at most 65,535 rows
    share_V = torch.softmax(torch.arange(8) * 0.25, 0)
    rows = rows_of(num, device)
    rows.seed_S[:] = 11
    rows.choice_S[:] = 0
    rows.position_S[:] = torch.arange(num)
    tiles = dataclasses.replace(SMALL, chunk=4)
    token_S, _ = sample(share_V.log().repeat(num, 1).to(device), rows, mode="plain", tiles=tiles)
    expected_V = share_V * num
    chi_square = float(((torch.bincount(token_S.cpu().long(), minlength=8) - expected_V) ** 2 / expected_V).sum())
    # Laurent and Massart: P(chi-square of k degrees >= k + 2 sqrt(k x) + 2 x) <= exp(-x)
    assert chi_square <= 7 + 2 * math.sqrt(7 * 14) + 2 * 14


@pytest.mark.parametrize("breakage", ["position", "top_k", "temperature"])
def test_a_broken_row_shows(breakage: str, device: torch.device) -> None:
    logits_SV = torch.randn(8, 63, generator=torch.Generator().manual_seed(4))
    rows = rows_of(8, device, top_k=20)
    token_S, _ = sample(logits_SV.to(device), rows, tiles=SMALL)
    assert misplaced(token_S, logits_SV, rows) <= EDGE
    field = getattr(rows, f"{breakage}_S")
    field += 1 if breakage != "temperature" else 0.25
    assert misplaced(token_S, logits_SV, rows) > EDGE


def _penalties(device: torch.device, vocab: int) -> tuple[Penalties, list[RowSampling]]:
    """Rows 0 and 1 with penalties in slots 2 and 0, row 2 with masked endings alone; no bias, no mask."""
    prompts, outs = [[1, 2, 3, 3, vocab - 1], [0], [5]], [[4, 4, 1], [9] * 5, [6]]
    sampling = [
        Sampling(max_tokens=9, temperature=1.5, repetition_penalty=1.25, frequency_penalty=0.3, presence_penalty=-0.7, seed=5, top_p=0.5),
        Sampling(max_tokens=9, temperature=0.0, repetition_penalty=0.75, min_tokens=9, frequency_penalty=1.7),
        Sampling(max_tokens=9, temperature=1.0, min_tokens=9, seed=3),
    ]
    bits_LW, counts_LV = empty_tables(3, vocab, device)
    bias_ids_LB, bias_LB = empty_biases(3, device)
    for row, slot in ((0, 2), (1, 0)):
        fill_slot(bits_LW[slot], counts_LV[slot], torch.tensor(prompts[row], device=device), torch.tensor(outs[row], device=device))

    def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    penalties = Penalties(
        repetition_S=column(1.25, 0.75, 1),
        frequency_S=column(0.3, 1.7, 0),
        presence_S=column(-0.7, 0, 0),
        slot_S=column(2, 0, -1, dtype=torch.int32),
        ending_ids_SE=torch.tensor([[-1, -1], [7, -1], [7, 8]], dtype=torch.int32, device=device),
        min_position_S=column(0, 10, 10, dtype=torch.int32),
        prompt_bits_LW=bits_LW,
        output_counts_LV=counts_LV,
        mask_S=column(-1, -1, -1, dtype=torch.int32),
        mask_bits_MW=empty_masks(2, vocab, device),
        num_biases_S=column(0, 0, 0, dtype=torch.int32),
        bias_ids_LB=bias_ids_LB,
        bias_LB=bias_LB,
    )
    endings = ((), (7,), (7, 8))
    return penalties, [
        RowSampling(sampling=sampling[row], choice=0, prompt_ids=prompts[row], output_ids=outs[row], ending_ids=endings[row])
        for row in range(3)
    ]


def test_penalties_masks_and_the_counts_that_follow(device: torch.device) -> None:
    vocab = 300
    penalties, asked = _penalties(device, vocab)
    rows = rows_of(3, device)
    rows.temperature_S[:] = torch.tensor([one.sampling.temperature for one in asked])
    rows.top_p_S[:] = torch.tensor([one.sampling.top_p for one in asked])
    rows.seed_S[:] = torch.tensor([one.sampling.seed for one in asked])
    rows.choice_S[:] = 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        logits_SV = torch.randn(3, vocab, generator=generator)
        logits_SV[:, :9] += 3.0
        logits_SV[1:, 7] += 9.0  # what the mask must hide
        rows.position_S[:] = torch.tensor([len(one.prompt_ids) + len(one.output_ids) for one in asked])
        expected = [one.token_id for one in Sampler().sample(logits_SV, asked)]
        assert sample_reference(logits_SV, rows, penalties)[0].tolist() == expected
        token_S, flag_S = sample(logits_SV.to(device), rows, penalties=penalties, tiles=SMALL)
        assert token_S.tolist() == expected and flag_S.count_nonzero() == 0
        asked = [dataclasses.replace(one, output_ids=[*one.output_ids, token]) for one, token in zip(asked, expected, strict=True)]
        for row, slot in ((0, 2), (1, 0)):
            counts_V = torch.bincount(torch.tensor(asked[row].output_ids), minlength=vocab)
            assert torch.equal(penalties.output_counts_LV[slot].cpu().long(), counts_V)
        assert penalties.output_counts_LV[1].count_nonzero() == 0


@pytest.mark.parametrize("mode", ["greedy", "plain", "limited"])
def test_biases_and_masks_stand_before_the_penalties(mode: Mode, device: torch.device) -> None:
    """Row 0 has both, row 1 a mask of two ids, row 2 a bias in a slot of its own: each as the CPU's definition says."""
    vocab, generator = 300, torch.Generator().manual_seed(8)
    penalties, _ = _penalties(device, vocab)
    penalties.slot_S[2] = 1
    rows = rows_of(3, device)
    rows.temperature_S[:] = 0.0 if mode == "greedy" else 0.8
    if mode == "limited":
        rows.top_k_S[:], rows.top_p_S[:] = 40, 0.9
    penalties.mask_S[:] = torch.tensor([1, 0, -1])
    penalties.num_biases_S[:] = torch.tensor([3, 0, 1])
    penalties.bias_ids_LB[2, :3] = torch.tensor([0, 31, 299])
    penalties.bias_LB[2, :3] = torch.tensor([9.0, -100.0, 8.5])
    penalties.bias_ids_LB[1, :2], penalties.bias_LB[1, :2] = torch.tensor([63, 64]), torch.tensor([6.0, 50.0])  # only one counts
    bits_MB = torch.zeros(2, 320, dtype=torch.int64)
    bits_MB[0, [64, 287]] = 1
    bits_MB[1, torch.randperm(300, generator=generator)[:90]] = 1
    words_MW = (bits_MB.view(2, 10, 32) << torch.arange(32)).sum(-1)
    penalties.mask_bits_MW[:] = torch.where(words_MW >= 1 << 31, words_MW - (1 << 32), words_MW).int()
    seen: list[set[int]] = [set(), set(), set()]
    for turn in range(40):
        logits_SV = torch.randn(3, vocab, generator=generator) * 2
        rows.seed_S[:] = turn
        token_S, flag_S = sample(logits_SV.to(device), rows, mode=mode, penalties=penalties, tiles=SMALL)
        penalties.output_counts_LV.zero_()
        assert misplaced(token_S, logits_SV, rows, penalties) <= EDGE and flag_S.count_nonzero() == 0
        for row, token in enumerate(token_S.tolist()):
            seen[row].add(token)
    assert all(bits_MB[1, token] for token in seen[0]) and seen[1] <= {64, 287} and len(seen[1]) == 2
    assert 63 in seen[2]


def test_a_mask_that_lets_nothing_through_is_an_error_of_its_row(device: torch.device) -> None:
    penalties, _ = _penalties(device, 63)
    penalties.mask_S[:] = torch.tensor([-1, 0, -1])
    token_S, flag_S = sample(torch.randn(3, 63).to(device), rows_of(3, device), penalties=penalties, tiles=SMALL)
    assert flag_S.tolist() == [0, INFINITE_FLAG.value, 0] and int(token_S[1]) == -1


def test_a_slot_holds_the_ids_it_was_filled_with(device: torch.device) -> None:
    bits_LW, counts_LV = empty_tables(1, 65, device)
    for prompt in ([0, 31, 32, 64], [5]):
        fill_slot(bits_LW[0], counts_LV[0], torch.tensor(prompt, device=device), torch.tensor([3] * 40000, device=device))
        bits_B = (bits_LW[0].cpu().long()[:, None] >> torch.arange(32)).flatten() & 1
        assert bits_B.nonzero().flatten().tolist() == prompt and counts_LV[0].nonzero().flatten().tolist() == [3]
    assert int(counts_LV[0, 3]) == 32767


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [151936, 50304, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_vocabularies(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Every kind of row, flat and peaked logits; a row's token is the same in a batch and alone."""
    generator = torch.Generator(device).manual_seed(vocab)
    logits_SV = (torch.randn(2 * len(KINDS), vocab, generator=generator, device=device)).to(dtype)
    logits_SV[len(KINDS) :] *= 3
    rows = rows_of(len(logits_SV), device)
    for at in range(len(logits_SV)):
        for name, value in list(KINDS.values())[at % len(KINDS)][1].items():
            getattr(rows, f"{name}_S")[at] = value
    token_S, flag_S = sample(logits_SV, rows)
    assert flag_S.count_nonzero() == 0 and misplaced(token_S, logits_SV, rows) <= EDGE
    fields = {field.name: getattr(rows, field.name)[:3].clone() for field in dataclasses.fields(rows)[:-1]}
    few = SampleRows(**fields, num_valid=torch.full((1,), 3, dtype=torch.int32, device=device))
    assert torch.equal(sample(logits_SV[:3].clone(), few)[0], token_S[:3])
