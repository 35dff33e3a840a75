"""Whole folders through the loader: many files, plain bf16, a wrong shape; each as fine or as named as the single fp8 file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomo.errors import ModelError
from duomo.models.qwen3_moe import Model, load_model
from duomo_kernels.quant_fp8 import quant_fp8

TINY_MOE = Path(__file__).parents[2] / "models" / "tiny-moe"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(TINY_MOE, tmp_path / "copy")
    return tmp_path / "copy"


def tensors_of(model: Model) -> list[Tensor]:
    found = [model.embed_VD, model.lm_head_DV]
    for layer in model.layers:
        found += [
            layer.attention.qkv_DP,
            layer.attention.out_HD,
            layer.experts.gate_DE,
            *layer.experts.gate_up_EDF,
            *layer.experts.down_EFD,
        ]
    return found


def test_an_fp8_model_in_three_files(folder: Path, model: Model) -> None:
    """A weight and its scale may lie in different files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{at % 3 + 1:05}-of-00003.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for ours, whole in zip(tensors_of(load_model(folder)), tensors_of(model), strict=True):
        assert torch.equal(ours, whole)


def test_a_bf16_model(folder: Path, model: Model) -> None:
    tensors = load_file(folder / "model.safetensors")
    scales = {name.removesuffix("_scale_inv"): tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    for name, scale in scales.items():
        tensors[name] = quant_fp8(tensors[name], scale, (128, 128))
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(folder)
    for ours, whole in zip(tensors_of(loaded), tensors_of(model), strict=True):
        assert ours.dtype is torch.float32 and torch.equal(ours, whole.to(torch.bfloat16).float())
    assert loaded.config.total_params == 16_291_072


def test_a_wrong_shape_is_named_with_both(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(255)}, file)
    with pytest.raises(ModelError, match=r"model.norm.weight .*\(255,\).*\(256,\)") as caught:
        load_model(folder)
    assert caught.value.code == "bad_tensor_shape"


def test_what_runs_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="duomo.models.qwen3_moe"):
        load_model(TINY_MOE)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "products by chain" in said or "products by tile" in said, said
