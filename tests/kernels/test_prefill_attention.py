"""Prefill attention against its formula in float64: packed lengths, cached prefixes, and neighbours that must not be seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from duomo_kernels import _prefill_library
from duomo_kernels._bounds import bound, error
from duomo_kernels.prefill_attention import CachedPrefix, PrefillConfig, choose_way, prefill_attention, prefill_attention_reference

SMALL = PrefillConfig(block_rows=32, block_keys=16, num_stages=2, num_warps=4)
OUT_OF_RANGE = 2**30  # a block that no pool has


@dataclass(frozen=True)
class Case:
    """Inputs of one call; padding rows and slots that must not be read are NaN, `clean` holds the prefix with zeros there."""

    q_THD: Tensor
    k_TND: Tensor
    v_TND: Tensor
    cu_seqlens_S1: Tensor
    prefix: CachedPrefix | None
    clean: CachedPrefix | None

    @property
    def num_valid(self) -> int:
        return int(self.cu_seqlens_S1[-1])

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q_THD.shape[2])

    def reference(self) -> Tensor:
        return prefill_attention_reference(self.q_THD, self.k_TND, self.v_TND, self.cu_seqlens_S1, self.scale, self.clean)[: self.num_valid]


def make_case(
    device: torch.device,
    lengths: list[int],
    heads: tuple[int, int] = (2, 1),
    dim: int = 32,
    cached: tuple[list[int], int] | None = None,
    seed: int = 0,
) -> Case:
    """cached: prefix lengths and block tokens."""
    made = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter of Triton 3.6 multiplies no bfloat16
    num_valid, num_padding = sum(lengths), 5
    packed = [torch.randn(num_valid + num_padding, n, dim, generator=made, device=device).to(dtype) for n in (heads[0], heads[1], heads[1])]
    for x in packed:
        x[num_valid:] = torch.nan
    cu_seqlens_S1 = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    prefix, clean = (None, None) if cached is None else _prefixes(made, dtype, heads[1], dim, *cached)
    return Case(packed[0], packed[1], packed[2], cu_seqlens_S1, prefix, clean)


def _prefixes(
    made: torch.Generator, dtype: torch.dtype, num_n: int, dim: int, lengths: list[int], block_tokens: int
) -> tuple[CachedPrefix, CachedPrefix]:
    """The same prefixes with NaN and with zeros in slots past their ends."""
    device, width = made.device, max(1, -(-max(lengths) // block_tokens)) + 1
    num_blocks = len(lengths) * width + 3
    pool = torch.randn(num_blocks, 2, num_n, block_tokens, dim, generator=made, device=device).to(dtype)
    clean = pool.clone()
    table_SB = (
        torch.randperm(num_blocks, generator=made, device=device).to(torch.int32)[: len(lengths) * width].view(-1, width).contiguous()
    )
    for s, length in enumerate(lengths):
        used = -(-length // block_tokens)
        if length % block_tokens:
            last = int(table_SB[s, used - 1])
            pool[last, :, :, length % block_tokens :] = torch.nan
            clean[last, :, :, length % block_tokens :] = 0
        table_SB[s, used:] = OUT_OF_RANGE
    lengths_S = torch.tensor(lengths, dtype=torch.int32, device=device)
    prefix = CachedPrefix(pool=pool, block_table_SB=table_SB, lengths_S=lengths_S)
    return prefix, replace(prefix, pool=clean)


def without_padding(case: Case) -> Case:
    q_THD, k_TND, v_TND = (x[: case.num_valid].contiguous() for x in (case.q_THD, case.k_TND, case.v_TND))
    return replace(case, q_THD=q_THD, k_TND=k_TND, v_TND=v_TND)


def attend(case: Case, config: PrefillConfig | None = SMALL) -> Tensor:
    """The valid rows; padding rows of the output must stay as they were."""
    out = torch.full_like(case.q_THD, torch.nan)
    packed = (case.q_THD, case.k_TND, case.v_TND, case.cu_seqlens_S1)
    prefill_attention(*packed, scale=case.scale, prefix=case.prefix, way="ours", config=config, out=out)
    assert bool(out[case.num_valid :].isnan().all())
    return out[: case.num_valid]


@pytest.mark.parametrize("lengths", [[1], [63], [257], [32, 64], [31, 1, 33, 0, 16]], ids=str)
def test_packed_lengths(device: torch.device, lengths: list[int]) -> None:
    case = make_case(device, lengths)
    assert error(attend(case), case.reference()) <= bound(case.q_THD.dtype)


@pytest.mark.parametrize(("heads", "dim"), [((4, 1), 128), ((2, 2), 64), ((6, 2), 16)], ids=str)
@pytest.mark.parametrize("config", [replace(SMALL, block_keys=32), replace(SMALL, block_rows=64)], ids=str)
def test_heads_dims_and_tiles(device: torch.device, heads: tuple[int, int], dim: int, config: PrefillConfig) -> None:
    case = make_case(device, [70, 3, 64], heads, dim)
    assert error(attend(case, config), case.reference()) <= bound(case.q_THD.dtype)


@pytest.mark.parametrize("block_tokens", [16, 32, 64])
@pytest.mark.parametrize("block_keys", [16, 32])
def test_cached_prefixes(device: torch.device, block_tokens: int, block_keys: int) -> None:
    case = make_case(device, [40, 1, 64], cached=([64, 0, 77], block_tokens))
    assert error(attend(case, replace(SMALL, block_keys=block_keys)), case.reference()) <= bound(case.q_THD.dtype)


def test_values_may_be_columns_of_the_joined_projection(device: torch.device) -> None:
    case = make_case(device, [40, 3], (4, 2), cached=([16, 20], 16))
    joined = torch.full((case.v_TND.shape[0], 8, 32), torch.nan, dtype=case.v_TND.dtype, device=device)
    joined[:, 6:] = case.v_TND
    assert torch.equal(attend(replace(case, v_TND=joined[:, 6:])), attend(case))


def test_float32_is_multiplied_whole(device: torch.device) -> None:
    """Not as TF32, on a GPU: its eleven bits of precision would show."""
    case = make_case(device, [40, 1, 20], cached=([16, 20, 0], 16))
    assert case.prefix is not None and case.clean is not None
    q_THD, k_TND, v_TND = (x.float() for x in (case.q_THD, case.k_TND, case.v_TND))
    prefix, clean = (replace(each, pool=each.pool.float()) for each in (case.prefix, case.clean))
    wide = replace(case, q_THD=q_THD + torch.rand_like(q_THD) * 2**-13, k_TND=k_TND, v_TND=v_TND, prefix=prefix, clean=clean)
    assert error(attend(wide, None), wide.reference()) <= bound(torch.float32)
    alone = replace(wide, prefix=None, clean=None)
    assert error(attend(alone, None), alone.reference()) <= bound(torch.float32)


def test_a_neighbour_with_nan_stays_alone(device: torch.device) -> None:
    case = make_case(device, [40, 33, 20], cached=([16, 20, 0], 16))
    expected = case.reference()
    case.k_TND[40:73], case.v_TND[40:73] = torch.nan, torch.nan
    out = attend(case)
    kept = torch.cat([torch.arange(40), torch.arange(73, 93)]).to(device)
    assert error(out[kept], expected[kept]) <= bound(out.dtype)


def test_company_changes_no_bit(device: torch.device) -> None:
    case = make_case(device, [40, 77, 20], cached=([16, 50, 0], 16))
    assert case.prefix is not None
    rows = slice(40, 117)
    out = torch.empty_like(case.q_THD[rows])
    alone = CachedPrefix(
        pool=case.prefix.pool,
        block_table_SB=case.prefix.block_table_SB[1:2].contiguous(),
        lengths_S=case.prefix.lengths_S[1:2].contiguous(),
    )
    cu_seqlens = torch.tensor([0, 77], dtype=torch.int32, device=device)
    packed = [x[rows].contiguous() for x in (case.q_THD, case.k_TND, case.v_TND)]
    prefill_attention(packed[0], packed[1], packed[2], cu_seqlens, scale=case.scale, prefix=alone, way="ours", config=SMALL, out=out)
    assert torch.equal(out, attend(case)[rows])


def test_a_prefix_and_its_rest_are_the_whole(device: torch.device) -> None:
    whole = make_case(device, [100])
    pool = torch.zeros(4, 2, 1, 16, 32, dtype=whole.q_THD.dtype, device=device)
    for side, x in enumerate((whole.k_TND, whole.v_TND)):
        pool[:, side] = x[:64].view(4, 16, 1, 32).transpose(1, 2)
    table_SB = torch.arange(4, dtype=torch.int32, device=device)[None]
    prefix = CachedPrefix(pool=pool, block_table_SB=table_SB, lengths_S=torch.tensor([64], dtype=torch.int32, device=device))
    packed = [x[64:].contiguous() for x in (whole.q_THD, whole.k_TND, whole.v_TND)]
    cu_seqlens = torch.tensor([0, 36], dtype=torch.int32, device=device)
    rest = attend(Case(packed[0], packed[1], packed[2], cu_seqlens, prefix, prefix))
    assert error(rest, whole.reference()[64:]) <= bound(rest.dtype)


def test_a_broken_kernel_fails_the_bound(device: torch.device) -> None:
    case = make_case(device, [40, 30], cached=([16, 20], 16))
    out, limit = attend(case), bound(case.q_THD.dtype)
    assert error(out, case.reference()) <= limit
    assert case.clean is not None
    short = replace(case, clean=replace(case.clean, lengths_S=case.clean.lengths_S - 1))
    assert error(out, short.reference()) > limit, "one cached key less"
    assert error(out, replace(case, clean=None).reference()) > limit, "no prefix"
    shifted = torch.tensor([0, 41, 70], dtype=torch.int32, device=device)
    assert error(out, replace(case, cu_seqlens_S1=shifted).reference()) > limit, "a border moved by one"
    assert error(out, replace(case, k_TND=case.k_TND.roll(1, 0)).reference()) > limit, "keys of the row before"


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    case = make_case(device, [40])
    with pytest.raises(AssertionError, match="cu_seqlens"):
        attend(replace(case, cu_seqlens_S1=case.cu_seqlens_S1.long()))
    with pytest.raises(AssertionError, match="v:"):
        attend(replace(case, v_TND=case.v_TND[1:]))
    with pytest.raises(AssertionError, match="side by side"):
        attend(replace(case, v_TND=case.v_TND.repeat_interleave(2, 2)[..., ::2]))
    with pytest.raises(AssertionError, match="prefix"):
        cached = make_case(device, [40], cached=([16], 16)).prefix
        prefill_attention(case.q_THD, case.k_TND, case.v_TND, case.cu_seqlens_S1, scale=1.0, prefix=cached, way="cudnn")
    with pytest.raises(AssertionError, match="tokens_each"):
        prefill_attention(case.q_THD, case.k_TND, case.v_TND, case.cu_seqlens_S1, scale=1.0, way="cudnn")
    with pytest.raises(AssertionError, match="1 x 40 rows are not 45"):  # five of the 45 are padding
        prefill_attention(case.q_THD, case.k_TND, case.v_TND, case.cu_seqlens_S1, scale=1.0, tokens_each=40)


def test_a_cpu_never_takes_cudnn() -> None:
    q_THD = torch.zeros(256, 2, 128, dtype=torch.bfloat16)
    assert choose_way(q_THD, tokens_each=256, has_prefix=False) == "ours"


@pytest.mark.parametrize("heads", [(4, 1), (2, 2)], ids=str)
def test_equal_sequences_are_views_of_packed_rows(device: torch.device, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to cuDNN and back, with torch's plain products in its place."""
    monkeypatch.setattr(_prefill_library, "BACKEND", SDPBackend.MATH)
    case = without_padding(make_case(device, [33, 33, 33], heads))
    out = torch.full_like(case.q_THD, torch.nan)
    packed = (case.q_THD, case.k_TND, case.v_TND, case.cu_seqlens_S1)
    got = prefill_attention(*packed, scale=case.scale, way="cudnn", tokens_each=33, out=out)
    assert got is out
    assert error(out, case.reference()) <= bound(out.dtype)
    assert torch.equal(prefill_attention(*packed, scale=case.scale, way="cudnn", tokens_each=33), out)
    assert error(attend(case), case.reference()) <= bound(out.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "dim", "block_tokens"),
    [((32, 4), 128, None), ((32, 4), 128, 16), ((32, 4), 128, 128), ((16, 16), 128, None), ((32, 8), 64, 64)],
    ids=str,
)
def test_real_shapes(heads: tuple[int, int], dim: int, block_tokens: int | None) -> None:
    lengths = [1024, 700, 1, 128, 300]
    cached = None if block_tokens is None else ([512, 0, 1000, 130, 4097], block_tokens)
    case = make_case(torch.device("cuda"), lengths, heads, dim, cached)
    assert error(attend(case, None), case.reference()) <= bound(case.q_THD.dtype)


@pytest.mark.gpu
def test_tiles_of_one_warpgroup() -> None:
    case = make_case(torch.device("cuda"), [1024, 700, 1], (32, 4), 128)
    config = PrefillConfig(block_rows=128, block_keys=32, num_stages=3, num_warps=4)
    assert error(attend(case, config), case.reference()) <= bound(case.q_THD.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("lengths", [[512, 512, 512], [1025]], ids=str)
def test_cudnn_takes_equal_lengths_into_a_graph(heads: tuple[int, int], lengths: list[int]) -> None:
    case = without_padding(make_case(torch.device("cuda"), lengths, heads, 128))
    case = replace(case, v_TND=torch.cat((case.q_THD, case.k_TND, case.v_TND), 1)[:, -heads[1] :])
    packed = (case.q_THD, case.k_TND, case.v_TND, case.cu_seqlens_S1)
    assert choose_way(case.q_THD, tokens_each=lengths[0], has_prefix=False) == "cudnn"
    prefill_attention(*packed, scale=case.scale, tokens_each=lengths[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefill_attention(*packed, scale=case.scale, tokens_each=lengths[0])
    out.fill_(torch.nan)
    graph.replay()
    assert error(out, case.reference()) <= bound(out.dtype)


def test_tiles_above_the_diagonal_are_never_visited(device: torch.device) -> None:
    """A weight of zero does not hide a NaN: rows whose tile ends before a key never met it."""
    case = make_case(device, [100, 40])
    expected = case.reference()
    for x in (case.k_TND, case.v_TND):
        x[64:100] = torch.nan
    found_THD = prefill_attention(case.q_THD, case.k_TND, case.v_TND, case.cu_seqlens_S1, scale=case.scale, config=SMALL)
    for rows in (slice(0, 64), slice(100, 140)):
        assert error(found_THD[rows], expected[rows]) <= bound(case.q_THD.dtype)
    assert found_THD[64:100].isnan().all()
