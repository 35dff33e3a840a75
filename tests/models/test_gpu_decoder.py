"""Every family's decoder against transformers: in float64, and layer by layer on the device with the attention of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.reference.float64_decoder import float64_run
from duomo.models.gpu_decoder import GpuDecoder, KvPlace, RowState
from duomo.models.gpu_weights import GpuLayer, GpuWeights
from duomo.models.rope import tables_for
from duomo_kernels._bounds import bound, error
from duomo_kernels.prefill_attention import prefill_attention_reference
from duomo_kernels.qk_rope_write import RopeTables
from tests.models.small_decoders import FAMILIES, Sizes, SmallDecoder, decoder_bound, small_decoder

TOKENS = torch.randint(3, 100, (21,), generator=torch.Generator().manual_seed(1)).tolist()
BLOCK_TOKENS = 16
TABLE = torch.tensor([2, 0])  # of TOKENS' blocks


class Forward:
    """All layers over one prompt, rows after its end being padding; attention by its float64 reference, rounded."""

    def __init__(self, weights: GpuWeights, token_ids: list[int], *, num_padding: int = 0, is_deterministic: bool = False) -> None:
        config, device = weights.config, weights.device
        self.decoder = GpuDecoder(weights, is_deterministic=is_deterministic)
        num_tokens = len(token_ids)
        shape = (config.num_layers, 3, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
        self.pool = torch.full(shape, torch.nan, dtype=weights.dtype, device=device)
        position_T = torch.arange(num_tokens)
        slot_T = TABLE[position_T // BLOCK_TOKENS] * BLOCK_TOKENS + position_T % BLOCK_TOKENS
        self.place = KvPlace(
            slot_T=torch.nn.functional.pad(slot_T, (0, num_padding), value=-1).to(device),
            position_T=torch.nn.functional.pad(position_T, (0, num_padding), value=12345).int().to(device),
            num_valid=torch.tensor([num_tokens], dtype=torch.int32, device=device) if num_padding else None,
            wants_packed=True,
        )
        self.cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
        self.rows = RowState(self.decoder.embed(torch.tensor([*token_ids, *[0] * num_padding], device=device)))
        self.ids: list[Tensor] = []
        for layer_idx in range(config.num_layers):
            self.ids.append(self.decoder.layer(layer_idx, self.rows, self.place, self.pool[layer_idx], self._attend))

    def _attend(self, q_THD: Tensor, k_TND: Tensor | None, v_TND: Tensor | None) -> Tensor:
        assert k_TND is not None and v_TND is not None
        out_THD = prefill_attention_reference(q_THD, k_TND, v_TND, self.cu_seqlens, self.decoder.attention_scale)
        return out_THD.to(q_THD.dtype)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def half(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16


@pytest.fixture(scope="module", params=FAMILIES)
def small(request: pytest.FixtureRequest, device: torch.device, half: torch.dtype) -> SmallDecoder:
    return small_decoder(request.param, dtype=half, device=device)


@pytest.fixture(scope="module")
def qwen(device: torch.device, half: torch.dtype) -> SmallDecoder:
    return small_decoder("qwen3_moe", dtype=half, device=device)


def test_the_reference_is_transformers(small: SmallDecoder) -> None:
    assert error(float64_run(small.weights, TOKENS).logits_TV, small.their_logits(TOKENS)) <= decoder_bound(torch.float32, 2)


def test_logits_are_within_the_bound(small: SmallDecoder) -> None:
    limit = decoder_bound(small.weights.dtype, small.weights.config.num_layers)
    forward = Forward(small.weights, TOKENS)
    expected = float64_run(small.weights, TOKENS, forward.ids)
    assert not expected.misrouted(limit)
    assert error(forward.decoder.logits(forward.rows), expected.logits_TV) <= limit


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_float32_logits_equal_those_of_transformers(family: str, device: torch.device) -> None:
    """Nobody's experts are given here: in float32 no two are so nearly level."""
    small = small_decoder(family, dtype=torch.float32, device=device)
    forward = Forward(small.weights, TOKENS)
    assert error(forward.decoder.logits(forward.rows), small.their_logits(TOKENS).to(device)) <= decoder_bound(torch.float32, 2)


def broken_layers(weights: GpuWeights) -> dict[str, GpuWeights]:
    """The model with one mistake each."""

    def layers(change: object) -> GpuWeights:
        assert callable(change)
        return replace(weights, layers=tuple(change(layer) for layer in weights.layers))

    def swapped_qk_norm(layer: GpuLayer) -> GpuLayer:
        assert layer.qk_norm is not None
        norm = replace(layer.qk_norm, q_weight=layer.qk_norm.k_weight.roll(1), k_weight=layer.qk_norm.q_weight)
        return replace(layer, qk_norm=norm)

    def swapped_norms(layer: GpuLayer) -> GpuLayer:
        return replace(layer, input_norm_D=layer.post_norm_D, post_norm_D=layer.input_norm_D)

    def no_qk_norm(layer: GpuLayer) -> GpuLayer:
        return replace(layer, qk_norm=None)

    def up_before_gate(layer: GpuLayer) -> GpuLayer:
        up_EFD, gate_EFD = layer.experts.gate_up_EFD.chunk(2, 1)
        return replace(layer, experts=replace(layer.experts, gate_up_EFD=torch.cat((gate_EFD, up_EFD), 1)))

    def wrong(**fields: object) -> GpuWeights:
        return replace(weights, config=replace(weights.config, **fields))  # type: ignore[arg-type]  # any field of it

    faster = wrong(rope_theta=weights.config.rope_theta / 2)
    cos_PD, sin_PD = (table.to(weights.device) for table in tables_for(faster.config))
    return {
        "q and k norm": layers(swapped_qk_norm),
        "no norm of q and k": layers(no_qk_norm),
        "input and post norm": layers(swapped_norms),
        "gate and up": layers(up_before_gate),
        "rope theta": replace(faster, rope=RopeTables(cos_PD=cos_PD, sin_PD=sin_PD)),
        "top-k not normalised": wrong(normalises_topk=not weights.config.normalises_topk),
        "epsilon": wrong(norm_eps=0.05),
        "a layer twice": replace(weights, layers=(weights.layers[0], weights.layers[0])),
    }


def test_a_broken_layer_exceeds_the_bound(qwen: SmallDecoder) -> None:
    forward = Forward(qwen.weights, TOKENS)
    logits_TV, limit = forward.decoder.logits(forward.rows), decoder_bound(qwen.weights.dtype, 2)
    assert error(logits_TV, float64_run(qwen.weights, TOKENS, forward.ids).logits_TV) <= limit
    for mistake, weights in broken_layers(qwen.weights).items():
        assert error(logits_TV, float64_run(weights, TOKENS, forward.ids).logits_TV) > 2 * limit, mistake
    run = float64_run(qwen.weights, TOKENS, [ids_TK.roll(1, 0) for ids_TK in forward.ids])
    assert run.misrouted(limit) > len(TOKENS) // 2, "experts of the row before"


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_padded_rows_take_no_expert_and_write_no_key(family: str, device: torch.device, half: torch.dtype) -> None:
    weights = small_decoder(family, dtype=half, device=device).weights
    padded, alone = Forward(weights, TOKENS, num_padding=4), Forward(weights, TOKENS)
    limit = decoder_bound(half, 2)
    num_tokens = len(TOKENS)
    assert not padded.rows.x_TD[num_tokens:].any(), "the experts' answer to padding"
    expected = float64_run(weights, TOKENS, [ids_TK[:num_tokens] for ids_TK in padded.ids]).logits_TV
    assert error(padded.decoder.logits(padded.rows)[:num_tokens], expected) <= limit
    assert torch.equal(padded.pool.isnan(), alone.pool.isnan()), "slots written"
    flat = padded.pool.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
    assert flat[:, :, :, : num_tokens - BLOCK_TOKENS].isfinite().all() and flat[:, :, :, BLOCK_TOKENS : 2 * BLOCK_TOKENS].isnan().all()


def test_selected_rows_leave_the_state(qwen: SmallDecoder) -> None:
    forward = Forward(qwen.weights, TOKENS)
    wanted = torch.tensor([3, 20], device=qwen.weights.device)
    first = forward.decoder.logits(forward.rows.select(wanted))
    again = forward.decoder.logits(forward.rows.select(wanted))
    assert first.dtype == torch.float32 and torch.equal(first, again)
    assert error(first, forward.decoder.logits(forward.rows)[wanted].double()) <= bound(qwen.weights.dtype)


def test_keys_are_packed_where_asked_alone(qwen: SmallDecoder) -> None:
    forward = Forward(qwen.weights, TOKENS)
    place = replace(forward.place, wants_packed=False)
    given: list[object] = []

    def attend(q_THD: Tensor, k_TND: Tensor | None, v_TND: Tensor | None) -> Tensor:
        given.extend((k_TND, v_TND))
        return q_THD

    rows = RowState(forward.decoder.embed(torch.tensor(TOKENS, device=qwen.weights.device)))
    forward.decoder.layer(0, rows, place, forward.pool[0], attend)
    assert given == [None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_fp8_weights(is_deterministic: bool, device: torch.device) -> None:
    """Against float64 with the same weights, dequantised: what rows lose is that the experts' inputs are fp8 too."""
    sizes = Sizes(num_layers=1, hidden=256, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=4, expert_hidden=128)
    weights = small_decoder("qwen3_moe", dtype=torch.bfloat16, device=device, sizes=sizes, quantise="fp8").weights
    layer = weights.layers[0]
    assert layer.qkv.is_fp8 and layer.out.scale_nk is not None and layer.experts.is_fp8
    forward = Forward(weights, TOKENS, is_deterministic=is_deterministic)
    expected = float64_run(weights, TOKENS, forward.ids)
    limit = decoder_bound(torch.float8_e4m3fn, 1)
    logits_TV = forward.decoder.logits(forward.rows)
    assert error(logits_TV, expected.logits_TV) <= limit
    unscaled = replace(layer, out=replace(layer.out, scale_nk=torch.ones_like(layer.out.scale_nk)))
    assert error(logits_TV, float64_run(replace(weights, layers=(unscaled,)), TOKENS, forward.ids).logits_TV) > limit


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_layers", [1, 8])
def test_wider_models_in_bf16(family: str, num_layers: int) -> None:
    sizes = Sizes(num_layers=num_layers, hidden=512, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=16, top_k=4, expert_hidden=384)
    device = torch.device("cuda")
    weights = small_decoder(family, dtype=torch.bfloat16, device=device, sizes=sizes).weights
    limit = decoder_bound(torch.bfloat16, num_layers)
    for is_deterministic in (False, True):
        forward = Forward(weights, TOKENS, is_deterministic=is_deterministic)
        expected = float64_run(weights, TOKENS, forward.ids)
        assert not expected.misrouted(limit)
        assert error(forward.decoder.logits(forward.rows), expected.logits_TV) <= limit
