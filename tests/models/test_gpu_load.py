"""Folders that transformers writes, of every family, as the GPU's tensors: in their places, in their format, and every fault named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from duomo.errors import ModelError
from duomo.models.gpu_load import load_gpu_weights
from duomo.models.gpu_weights import GpuWeights, LinearWeights
from duomo.models.weights import WeightFolder
from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights, dequantised
from duomo_kernels._weights_fp8 import quantise_blocks_fp8
from duomo_kernels.norm_rope import rope_tables
from duomo_kernels.quant_fp8 import quant_fp8

CPU = torch.device("cpu")
TINY_MOE = Path(__file__).parents[2] / "models" / "tiny-moe"
SIZES = {
    "vocab_size": 70, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 96, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 48, "num_experts": 3, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 3},
    "llama": {},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Tensor]:
    """A random model written as transformers writes it. Its parameters by transformers' own names, which are not the file's."""
    torch.manual_seed(len(family))
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family] | sizes)
    model = AutoModelForCausalLM.from_config(config).to(dtype)  # type: ignore[no-untyped-call]  # transformers ships no types
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    state: dict[str, Tensor] = model.state_dict()
    return state


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    edit(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def to_fp8(folder: Path, block: tuple[int, int] = (128, 128), scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Make every projection of a folder fp8, as Qwen3-30B-A3B-FP8 is. All tensors as they then count, in float32."""
    wide: dict[str, Tensor] = {}

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            wide[name] = tensors[name].float()
            if not name.endswith("proj.weight"):
                continue
            rows, columns = tensors[name].shape
            scale = (torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5).to(scale_dtype)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
            wide[name] = quant_fp8(tensors[name], scale.float(), block)

    edit_tensors(folder, quantise)
    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_config(folder, lambda raw: raw.update(quantization_config=section))
    return wide


def linear(weights: LinearWeights) -> Tensor:
    if weights.scale_nk is None:
        return weights.weight_NK.float()
    return quant_fp8(weights.weight_NK, weights.scale_nk, (SCALE_BLOCK, SCALE_BLOCK))


def experts(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    return dequantised(weights, torch.float32)


def assert_same(ours: GpuWeights, theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor of ours against transformers' own, rounded to dtype."""

    def take(name: str) -> Tensor:
        return theirs[name].to(dtype)

    assert torch.equal(ours.embed_VD, take("model.embed_tokens.weight")) and torch.equal(ours.norm_D, take("model.norm.weight"))
    assert torch.equal(ours.head_VD, take("lm_head.weight")) and ours.dtype == dtype and ours.device == CPU
    for index, layer in enumerate(ours.layers):
        at = f"model.layers.{index}."
        assert torch.equal(layer.input_norm_D, take(f"{at}input_layernorm.weight"))
        assert torch.equal(layer.post_norm_D, take(f"{at}post_attention_layernorm.weight"))
        assert torch.equal(layer.qkv.weight_NK, torch.cat([take(f"{at}self_attn.{side}_proj.weight") for side in "qkv"]))
        assert torch.equal(layer.out.weight_NK, take(f"{at}self_attn.o_proj.weight")) and not layer.out.is_fp8
        assert (layer.qk_norm is None) is (f"{at}self_attn.q_norm.weight" not in theirs)
        if layer.qk_norm is not None:
            assert torch.equal(layer.qk_norm.q_weight, take(f"{at}self_attn.q_norm.weight"))
            assert torch.equal(layer.qk_norm.k_weight, take(f"{at}self_attn.k_norm.weight"))
            assert layer.qk_norm.eps == ours.config.norm_eps
        if layer.router_ED is not None:
            assert torch.equal(layer.router_ED, take(f"{at}mlp.gate.weight"))
            gate_up_EFD, down_EDF = take(f"{at}mlp.experts.gate_up_proj"), take(f"{at}mlp.experts.down_proj")
        else:
            gate_up_EFD = torch.cat([take(f"{at}mlp.{side}_proj.weight") for side in ("gate", "up")])[None]
            down_EDF = take(f"{at}mlp.down_proj.weight")[None]
        assert torch.equal(layer.experts.gate_up_EFD, gate_up_EFD) and torch.equal(layer.experts.down_EDF, down_EDF)


@pytest.mark.parametrize(
    ("stored", "asked"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_lands_in_its_places(family: str, stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    theirs = save(tmp_path, family, stored)
    ours = load_gpu_weights(tmp_path, device=CPU, dtype=asked)
    assert_same(ours, theirs, asked)
    assert (ours.head_VD is ours.embed_VD) is ours.config.ties_embeddings
    cos_PD, sin_PD = rope_tables(96, ours.config.head_dim, ours.config.rope_theta)
    assert torch.equal(ours.rope.cos_PD, cos_PD) and torch.equal(ours.rope.sin_PD, sin_PD)
    assert (ours.layers[0].router_ED is None) is (family in ("llama", "qwen3"))


def test_many_files(tmp_path: Path) -> None:
    theirs = save(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-{at % 3 + 1:05}-of-00003.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_gpu_weights(tmp_path, device=CPU, dtype=torch.float32), theirs, torch.float32)


FP8_SIZES: dict[str, Any] = {"hidden_size": 160, "moe_intermediate_size": 128, "head_dim": 64, "num_hidden_layers": 1}
"""Columns of 160: an edge block. Rows of q, k and v: 256, 128, 128."""


def assert_counts_as(ours: GpuWeights, wide: dict[str, Tensor], dtype: torch.dtype) -> None:
    """What the first layer's products multiply by, whatever their format, is `wide` rounded to dtype where they are not fp8."""
    layer, at = ours.layers[0], "model.layers.0."
    qkv = torch.cat([wide[f"{at}self_attn.{side}_proj.weight"] for side in "qkv"])
    gate_up_EFD, down_EDF = experts(layer.experts)
    for index in range(ours.config.num_experts):
        one = f"{at}mlp.experts.{index}."
        pair = torch.cat([wide[f"{one}gate_proj.weight"], wide[f"{one}up_proj.weight"]])
        assert torch.equal(gate_up_EFD[index], pair if layer.experts.is_fp8 else pair.to(dtype).float())
        down = wide[f"{one}down_proj.weight"]
        assert torch.equal(down_EDF[index], down if layer.experts.is_fp8 else down.to(dtype).float())
    assert torch.equal(linear(layer.qkv), qkv if layer.qkv.is_fp8 else qkv.to(dtype).float())
    out = wide[f"{at}self_attn.o_proj.weight"]
    assert torch.equal(linear(layer.out), out if layer.out.is_fp8 else out.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_of_128_stay_as_they_are(dtype: torch.dtype, scale_dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", torch.bfloat16, **FP8_SIZES)
    wide = to_fp8(tmp_path, scale_dtype=scale_dtype)
    ours = load_gpu_weights(tmp_path, device=CPU, dtype=dtype)
    layer = ours.layers[0]
    assert layer.qkv.is_fp8 and layer.out.is_fp8 and layer.experts.is_fp8
    assert ours.embed_VD.dtype == ours.head_VD.dtype == layer.input_norm_D.dtype == dtype
    assert layer.router_ED is not None and layer.router_ED.dtype == dtype
    assert layer.qkv.scale_nk is not None and layer.qkv.scale_nk.shape == (4, 2)
    assert_counts_as(ours, wide, dtype)


@pytest.mark.parametrize(("block", "dtype"), [((128, 128), torch.float32), ((64, 32), torch.float32), ((64, 32), torch.bfloat16)])
def test_other_fp8_is_dequantised(block: tuple[int, int], dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "qwen3_moe", torch.bfloat16, **FP8_SIZES)
    wide = to_fp8(tmp_path, block)
    with caplog.at_level(logging.WARNING, logger="duomo.models"):
        ours = load_gpu_weights(tmp_path, device=CPU, dtype=dtype)
    said = ["not (64, 32)" in record.getMessage() for record in caplog.records]
    assert said == ([] if dtype is torch.float32 else [True]), "who asked for float32 was given it"
    assert not (ours.layers[0].qkv.is_fp8 or ours.layers[0].out.is_fp8 or ours.layers[0].experts.is_fp8)
    assert_counts_as(ours, wide, dtype)


def test_products_left_wide_in_an_fp8_model_stay_wide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "qwen3_moe", torch.bfloat16, **FP8_SIZES)
    kept = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    wide = to_fp8(tmp_path)
    wide["model.layers.0.self_attn.k_proj.weight"] = kept.float()
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": kept}))
    with caplog.at_level(logging.WARNING, logger="duomo.models"):
        ours = load_gpu_weights(tmp_path, device=CPU)
    assert ["only some of their weights" in record.getMessage() for record in caplog.records] == [True]
    assert not ours.layers[0].qkv.is_fp8 and ours.layers[0].out.is_fp8 and ours.layers[0].experts.is_fp8
    assert_counts_as(ours, wide, torch.bfloat16)


def test_blocks_that_cross_a_boundary_are_widened_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = FP8_SIZES | {"moe_intermediate_size": 96, "head_dim": 48, "num_hidden_layers": 2}
    save(tmp_path, "qwen3_moe", torch.bfloat16, **sizes)
    wide = to_fp8(tmp_path)
    with caplog.at_level(logging.WARNING, logger="duomo.models.gpu_build"):
        ours = load_gpu_weights(tmp_path, device=CPU)
    assert not ours.layers[0].qkv.is_fp8 and not ours.layers[0].experts.is_fp8 and ours.layers[0].out.is_fp8
    assert_counts_as(ours, wide, torch.bfloat16)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "192 + 96 + 96 rows" in said[0] and "96 rows each" in said[1], said


@pytest.mark.parametrize("is_fp8_folder", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_quantised_on_load(family: str, is_fp8_folder: bool, tmp_path: Path) -> None:
    """From half precision as the loader without it gives it; of an fp8 folder with other blocks too. Rows of q, k, v need no alignment."""
    sizes = {"hidden_size": 160, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 48, "num_hidden_layers": 1}
    save(tmp_path, family, torch.bfloat16, **sizes)
    if is_fp8_folder:
        to_fp8(tmp_path, (32, 64))
    wide, ours = load_gpu_weights(tmp_path, device=CPU).layers[0], load_gpu_weights(tmp_path, device=CPU, quantise="fp8").layers[0]
    pairs = ((ours.qkv, wide.qkv.weight_NK), (ours.out, wide.out.weight_NK))
    for got, weight_NK in pairs:
        stored_1NK, scale_1nk = quantise_blocks_fp8(weight_NK[None])
        assert got.scale_nk is not None and torch.equal(got.scale_nk, scale_1nk[0])
        assert torch.equal(got.weight_NK.view(torch.uint8), stored_1NK[0].view(torch.uint8))
        assert (linear(got) - weight_NK.float()).abs().max() <= 2**-4 * weight_NK.float().abs().max()
    for got_ENK, scale_Enk, wide_ENK in (
        (ours.experts.gate_up_EFD, ours.experts.gate_up_scale_Efd, wide.experts.gate_up_EFD),
        (ours.experts.down_EDF, ours.experts.down_scale_Edf, wide.experts.down_EDF),
    ):
        stored, scale = quantise_blocks_fp8(wide_ENK)
        assert scale_Enk is not None and torch.equal(scale_Enk, scale) and torch.equal(got_ENK.view(torch.uint8), stored.view(torch.uint8))


def test_experts_that_cannot_be_quantised_stay_wide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "olmoe", torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="duomo.models.gpu_build"):
        layer = load_gpu_weights(tmp_path, device=CPU, quantise="fp8").layers[1]
    assert layer.qkv.is_fp8 and layer.out.is_fp8 and not layer.experts.is_fp8
    assert ["48 rows each" in record.getMessage() for record in caplog.records] == [True]


def test_fp8_beside_float32_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    with pytest.raises(ModelError, match="float32") as caught:
        load_gpu_weights(tmp_path, device=CPU, dtype=torch.float32, quantise="fp8")
    assert caught.value.code == "bad_quantisation"


def test_the_embedded_model_in_both_formats() -> None:
    wide, ours = (load_gpu_weights(TINY_MOE, device=CPU, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for wide_layer, layer in zip(wide.layers, ours.layers, strict=True):
        assert layer.experts.is_fp8 and layer.qkv.is_fp8 and layer.out.is_fp8 and not wide_layer.experts.is_fp8
        assert torch.equal(linear(layer.qkv), wide_layer.qkv.weight_NK) and torch.equal(linear(layer.out), wide_layer.out.weight_NK)
        for got, want in zip(experts(layer.experts), experts(wide_layer.experts), strict=True):
            assert torch.equal(got, want)
    assert ours.head_VD is ours.embed_VD and not wide.layers[0].out.is_fp8


@pytest.mark.parametrize(
    ("edit", "code", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing_tensor", "model.norm.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "missing_tensor", "lm_head.weight"),
        (
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            "missing_tensor",
            "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 64)}),
            "bad_tensor_shape",
            r"k_proj.weight .*\(16, 64\).*\(32, 64\)",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "bad_quantisation",
            "model.norm.weight .*int8",
        ),
    ],
)
def test_faults_name_the_tensor(edit: Callable[[dict[str, Tensor]], object], code: str, words: str, tmp_path: Path) -> None:
    save(tmp_path, "mixtral")
    edit_tensors(tmp_path, edit)
    with pytest.raises(ModelError, match=words) as caught:
        load_gpu_weights(tmp_path, device=CPU)
    assert caught.value.code == code


def test_faults_of_scales(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", torch.bfloat16, **FP8_SIZES)
    to_fp8(tmp_path)
    name = "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv"
    for edit, code in (
        (lambda tensors: tensors.update({name: torch.ones(2, 2)}), "bad_tensor_shape"),
        (lambda tensors: tensors.pop(name), "missing_tensor"),
    ):
        edit_tensors(tmp_path, edit)
        with pytest.raises(ModelError, match=name) as caught:
            load_gpu_weights(tmp_path, device=CPU)
        assert caught.value.code == code
    edit_config(tmp_path, lambda raw: raw.pop("quantization_config"))
    with pytest.raises(ModelError, match="float8_e4m3fn"):
        load_gpu_weights(tmp_path, device=CPU)


def test_progress_counts_every_tensor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    take = WeightFolder.take_stored

    def counting(self: WeightFolder, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        taken.append(name)
        return take(self, name, shape)

    monkeypatch.setattr(WeightFolder, "take_stored", counting)
    counts: list[tuple[int, int]] = []
    load_gpu_weights(TINY_MOE, device=CPU, progress=True, count=lambda done, whole: counts.append((done, whole)))
    captured = capsys.readouterr()
    assert counts == [(done, len(taken)) for done in range(1, len(taken) + 1)]
    assert f"/{len(taken)} " in captured.err and len(taken) == len(set(taken)) and not captured.out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_device_gets_what_the_cpu_gets(dtype: torch.dtype) -> None:
    cuda, cpu = (load_gpu_weights(TINY_MOE, device=torch.device(device), dtype=dtype) for device in ("cuda", "cpu"))
    assert cuda.device.type == cuda.rope.cos_PD.device.type == "cuda" and torch.equal(cuda.embed_VD.cpu(), cpu.embed_VD)
    for there, here in zip(cuda.layers, cpu.layers, strict=True):
        assert there.experts.is_fp8 is here.experts.is_fp8 is (dtype is torch.bfloat16)
        assert torch.equal(linear(there.qkv).cpu(), linear(here.qkv)) and torch.equal(linear(there.out).cpu(), linear(here.out))
        for got, want in zip(experts(there.experts), experts(here.experts), strict=True):
            assert torch.equal(got.cpu(), want)
