"""The weighted sum of experts' rows against float64: drops, padding, capacity's residual, odd sizes, and tokens that stand alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels._routing import Routing, routing_reference
from duomo_kernels.expert_combine import _block_d, expert_combine, expert_combine_reference

BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One call; rows at places that no assignment has are poisoned."""

    rows_RD: Tensor
    place_R: Tensor
    weights_TK: Tensor
    x_TD: Tensor
    lost_T: Tensor


def _inputs(tokens: int, top_k: int, width: int, device: torch.device, dtype: torch.dtype = BF16, num_valid: int | None = None) -> Inputs:
    make = torch.Generator().manual_seed(tokens * 101 + width)
    num_experts = top_k + 3
    ids_TK = torch.rand(tokens, num_experts, generator=make).topk(top_k).indices
    weights_TK = torch.rand(tokens, top_k, generator=make).softmax(-1)
    routing: Routing = routing_reference(ids_TK, weights_TK, num_experts, 16, num_valid)
    rows_RD = torch.randn(tokens * top_k, width, generator=make).to(dtype)
    used_R = torch.zeros(tokens * top_k + 1, dtype=torch.bool)
    used_R[routing.place_R.long()] = True
    rows_RD[~used_R[:-1]] = float("nan")
    given = Inputs(
        rows_RD=rows_RD,
        place_R=routing.place_R,
        weights_TK=routing.weights_TK,
        x_TD=torch.randn(tokens, width, generator=make).to(dtype),
        lost_T=torch.rand(tokens, generator=make),
    )
    return Inputs(**{name: getattr(given, name).to(device) for name in Inputs.__slots__})


def _dropped(given: Inputs, every: int) -> Inputs:
    """Every so many assignments dropped: no place, a row that was never written, a weight that must not count."""
    gone_R = torch.arange(len(given.place_R), device=given.place_R.device) % every == every - 1
    rows_RD, weights_TK = given.rows_RD.clone(), given.weights_TK.clone()
    place_R = torch.where(gone_R, len(given.place_R), given.place_R)
    gone_places = given.place_R[gone_R].long()
    rows_RD[gone_places[gone_places < len(rows_RD)]] = float("nan")
    weights_TK.view(-1)[gone_R] = float("inf")
    return replace(given, rows_RD=rows_RD, weights_TK=weights_TK, place_R=place_R.int())


def _run(given: Inputs, with_lost: bool = False) -> Tensor:
    out_TD = torch.full_like(given.x_TD, float("nan"))
    lost_T, x_TD = (given.lost_T, given.x_TD) if with_lost else (None, None)
    return expert_combine(given.rows_RD, given.place_R, given.weights_TK, lost_T=lost_T, x_TD=x_TD, out_TD=out_TD)


def _reference(given: Inputs, with_lost: bool = False) -> Tensor:
    lost_T, x_TD = (given.lost_T, given.x_TD) if with_lost else (None, None)
    return expert_combine_reference(given.rows_RD, given.place_R, given.weights_TK, lost_T, x_TD)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 8, 257), (63, 2, 63), (257, 1, 31), (3, 3, 2880)])
def test_sum(tokens: int, top_k: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    given = _inputs(tokens, top_k, width, device, dtype)
    assert error(_run(given), _reference(given)) <= bound(dtype)


@pytest.mark.parametrize("with_lost", [False, True])
def test_dropped_and_padded_places_add_nothing(with_lost: bool, device: torch.device) -> None:
    given = _dropped(_inputs(19, 4, 96, device, num_valid=13), every=3)
    out_TD = _run(given, with_lost)
    assert error(out_TD, _reference(given, with_lost)) <= bound(BF16)
    if not with_lost:
        assert not out_TD[13:].any()


def test_residual_of_what_was_lost(device: torch.device) -> None:
    given = _inputs(9, 2, 300, device)
    assert error(_run(given, with_lost=True), _reference(given, with_lost=True)) <= bound(BF16)
    nothing_lost = replace(given, lost_T=torch.zeros_like(given.lost_T))
    assert torch.equal(_run(nothing_lost, with_lost=True), _run(given))


def test_a_token_has_the_same_bits_in_every_batch_and_tile(device: torch.device) -> None:
    given = _inputs(13, 3, 1500, device)
    whole_TD = _run(given)
    assert _block_d(13, 1500, 4) != _block_d(1, 1500, 132)
    for tokens in (slice(0, 1), slice(5, 12)):
        place_TK = given.place_R.view(13, 3)[tokens]
        num = place_TK.numel()
        alone = replace(  # these tokens' rows, gathered to the front in another order
            given,
            rows_RD=given.rows_RD[place_TK.flatten().long()].flip(0).contiguous(),
            place_R=torch.arange(num - 1, -1, -1, dtype=torch.int32, device=device),
            weights_TK=given.weights_TK[tokens].contiguous(),
            x_TD=given.x_TD[tokens].contiguous(),
        )
        assert torch.equal(_run(alone), whole_TD[tokens])


def test_the_tile_follows_the_tokens() -> None:
    assert [_block_d(tokens, 2048, 132) for tokens in (1, 16, 64, 4096)] == [256, 256, 512, 1024]
    assert _block_d(1, 63, 132) == 64 and _block_d(1, 1, 132) == 1


def test_no_tokens(device: torch.device) -> None:
    given = _inputs(2, 2, 64, device)
    assert expert_combine(given.rows_RD[:0], given.place_R[:0], given.weights_TK[:0]).shape == (0, 64)


def test_a_broken_combine_fails(device: torch.device) -> None:
    given = _inputs(9, 4, 129, device)
    good_TD = _reference(given)
    one_row_RD = given.rows_RD.clone()
    one_row_RD[20] += 0.5
    swapped_TK = given.weights_TK.clone()
    swapped_TK[7] = swapped_TK[7].roll(1)
    broken = [
        replace(given, place_R=given.place_R.roll(1)),
        replace(given, rows_RD=one_row_RD),
        replace(given, weights_TK=swapped_TK),
        replace(given, weights_TK=given.weights_TK * 1.02),
        _dropped(given, every=10),
    ]
    assert error(_run(given), good_TD) <= bound(BF16)
    for at, wrong in enumerate(broken):
        assert error(_run(wrong), good_TD) > bound(BF16), at
    assert error(_run(given, with_lost=True), good_TD) > bound(BF16)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    given = _inputs(4, 2, 64, device)
    wrong = [
        replace(given, rows_RD=given.rows_RD[:-1]),
        replace(given, place_R=given.place_R.long()),
        replace(given, weights_TK=given.weights_TK.double()),
        replace(given, rows_RD=given.rows_RD.float()),
    ]
    for each in wrong:
        with pytest.raises(AssertionError):
            _run(each)
    with pytest.raises(AssertionError):
        expert_combine(given.rows_RD, given.place_R, given.weights_TK, lost_T=given.lost_T)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(4096, 8, 2048), (1024, 2, 4096), (257, 8, 7168)])
def test_real_shapes(tokens: int, top_k: int, width: int, device: torch.device) -> None:
    num_routed = tokens * top_k
    rows_RD = torch.randn(num_routed, width, device=device, dtype=BF16)
    place_R = torch.randperm(num_routed, device=device).int()
    place_R[torch.rand(num_routed, device=device) < 0.1] = num_routed
    weights_TK = torch.rand(tokens, top_k, device=device)
    padded_RD = torch.cat((rows_RD, torch.zeros(1, width, device=device, dtype=BF16)))
    expected_TD = torch.zeros(tokens, width, dtype=torch.float64, device=device)
    for k in range(top_k):  # the reference walks single places: too slow at this size
        expected_TD += weights_TK[:, k, None].double() * padded_RD[place_R.view(tokens, top_k)[:, k].long()].double()
    out_TD = expert_combine(rows_RD, place_R, weights_TK, out_TD=torch.full((tokens, width), float("nan"), device=device, dtype=BF16))
    assert error(out_TD, expected_TD) <= bound(BF16)
    assert torch.equal(out_TD, expert_combine(rows_RD, place_R, weights_TK))
