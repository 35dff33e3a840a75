"""Log-probabilities on the device against float64 and against what the CPU's sampler reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("msgspec", reason="the engine, whose sampler is compared with, needs msgspec")

from duomo.engine.sampler import RowSampling, Sampler
from duomo.wire.values import Sampling
from duomo_kernels._bounds import bound, error
from duomo_kernels.token_logprobs import token_logprobs, token_logprobs_reference


def poisoned(num: int, max_top: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    top_id_SN = torch.full((num, max_top), -77, dtype=torch.int32, device=device)
    return torch.full((num,), torch.nan, device=device), top_id_SN, torch.full((num, max_top), torch.nan, device=device)


def int32(values: object, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def check_against_reference(logits_SV: Tensor, token_S: Tensor, max_top: int, device: torch.device) -> float:
    """The worst error; the ids must be the reference's."""
    num, vocab = logits_SV.shape
    out = poisoned(num, max_top, device)
    got_S, id_SN, got_SN = token_logprobs(logits_SV, token_S, int32([max_top] * num, device), int32([num], device), max_top, out=out)
    ref_S, ref_id_SN, ref_SN = token_logprobs_reference(logits_SV.cpu(), token_S.cpu(), max_top)
    listed = min(max_top, vocab)
    assert torch.equal(id_SN[:, :listed].cpu(), ref_id_SN) and bool((id_SN[:, listed:] == -77).all())
    # rows of probabilities: a logprob near 0 is right when its probability is
    tops = error(got_SN[:, :listed].cpu().exp(), ref_SN.exp()) if listed else 0.0
    return max(error(got_S.cpu(), ref_S), tops)


@pytest.mark.parametrize(("vocab", "max_top"), [(1, 1), (3, 20), (63, 5), (2048, 0), (2049, 3), (4500, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs(vocab: int, max_top: int, dtype: torch.dtype, device: torch.device) -> None:
    """bf16 logits tie: the lower id comes first."""
    generator = torch.Generator().manual_seed(vocab)
    logits_SV = (torch.randn(2, vocab, generator=generator) * 4).to(dtype).to(device)
    token_S = torch.randint(0, vocab, (2,), generator=generator).int().to(device)
    if vocab == 1:  # certain: 0 exactly
        assert token_logprobs(logits_SV, token_S, int32([1, 1], device), int32([2], device), 1)[0].tolist() == [0.0, 0.0]
        return
    assert check_against_reference(logits_SV, token_S, max_top, device) <= bound(torch.float32)


def test_agrees_with_the_cpu_sampler(device: torch.device) -> None:
    logits_SV = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    row = RowSampling(sampling=Sampling(max_tokens=1, temperature=0.0, logprobs=5), choice=0, prompt_ids=[1], output_ids=[])
    (expected,) = Sampler().sample(logits_SV, [row])
    token_S = int32([expected.token_id], device)
    logprob_S, id_SN, logprob_SN = token_logprobs(logits_SV.to(device), token_S, int32([5], device), int32([1], device), 5)
    assert id_SN[0].tolist() == [token for token, _ in expected.top]
    assert logprob_SN[0].tolist() == pytest.approx([value for _, value in expected.top], rel=2.0**-16)
    assert float(logprob_S[0]) == pytest.approx(expected.logprob, rel=2.0**-16)


def test_rows_that_ask_for_less(device: torch.device) -> None:
    """Masked logits, a token that does not exist, a row that asks for nothing, one that asks for fewer, padding, a NaN."""
    logits_SV = torch.randn(6, 2100, generator=torch.Generator().manual_seed(1))
    logits_SV[0, :2090] = -torch.inf
    logits_SV[4, 2099] = torch.nan
    out = poisoned(6, 4, device)
    num_top_S, token_S = int32([4, -1, 2, 0, 4, 4], device), int32([2095, 1, -1, 7, 0, 0], device)
    logprob_S, id_SN, logprob_SN = (
        one.cpu() for one in token_logprobs(logits_SV.to(device), token_S, num_top_S, int32([5], device), 4, out)
    )
    ref_S, ref_id_SN, ref_SN = token_logprobs_reference(logits_SV, token_S.cpu(), 4)
    assert torch.equal(id_SN[0], ref_id_SN[0]) and error(logprob_SN[0], ref_SN[0]) <= bound(torch.float32)
    assert error(logprob_S[[0, 3]], ref_S[[0, 3]]) <= bound(torch.float32) and float(logprob_S[2]) == -torch.inf
    assert torch.equal(id_SN[2, :2], ref_id_SN[2, :2]) and bool((id_SN[[1, 3, 5]] == -77).all()) and bool((id_SN[2, 2:] == -77).all())
    assert logprob_S[[1, 4, 5]].isnan().all() and logprob_SN[[1, 3, 4, 5]].isnan().all()


def test_a_row_that_asks_for_more_is_cut(device: torch.device) -> None:
    """num_top above max_top lists max_top tokens, and writes nothing into the next row's list, which asks for none."""
    logits_SV, token_S = torch.randn(2, 2100, generator=torch.Generator().manual_seed(3)), int32([5, 6], device)
    out = poisoned(2, 3, device)
    got_S, id_SN, got_SN = (
        one.cpu() for one in token_logprobs(logits_SV.to(device), token_S, int32([20, 0], device), int32([2], device), 3, out)
    )
    ref_S, ref_id_SN, ref_SN = token_logprobs_reference(logits_SV, token_S.cpu(), 3)
    assert torch.equal(id_SN[0], ref_id_SN[0]) and max(error(got_SN[0], ref_SN[0]), error(got_S, ref_S)) <= bound(torch.float32)
    assert bool((id_SN[1] == -77).all()) and bool(got_SN[1].isnan().all())


def test_a_wrong_token_shows(device: torch.device) -> None:
    logits_SV = torch.randn(2, 63, generator=torch.Generator().manual_seed(2))
    ones = int32([0, 0], device)
    got_S = token_logprobs(logits_SV.to(device), int32([3, 4], device), ones, int32([2], device), 0)[0].cpu()
    assert error(got_S, token_logprobs_reference(logits_SV, int32([3, 5], torch.device("cpu")), 0)[0]) > bound(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [151936, 50257])
def test_real_vocabularies(vocab: int, device: torch.device) -> None:
    logits_SV = torch.randn(5, vocab, device=device) * 3
    assert check_against_reference(logits_SV, logits_SV.argmin(-1).int(), 20, device) <= bound(torch.float32)
