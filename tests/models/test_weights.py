"""Weights from one file or many, plain or fp8, odd edges, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from duomo.errors import ModelError
from duomo.models.config import Fp8Blocks
from duomo.models.weights import WeightFolder

FP8 = Fp8Blocks(block=(128, 128))


def open_folder(folder: Path, quantisation: Fp8Blocks | None = FP8) -> WeightFolder:
    return WeightFolder(folder, quantisation, num_tensors=3, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(63, 5).to(dtype)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    with open_folder(tmp_path, None) as weights:
        taken = weights.take("w", (63, 5))
    assert taken.dtype is torch.float32 and torch.equal(taken, tensor.float())


def test_fp8_with_odd_edges(tmp_path: Path) -> None:
    q, scale = torch.randn(130, 257).to(torch.float8_e4m3fn), torch.rand(2, 3)
    save_file({"w": q, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    with open_folder(tmp_path) as weights:
        taken = weights.take("w", (130, 257))
    assert taken[129, 256] == q[129, 256].float() * scale[1, 2]
    assert taken[0, 128] == q[0, 128].float() * scale[0, 1]


def test_many_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.full((2,), float(ord(name)))}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors", "d": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_folder(tmp_path) as weights:
        assert weights.take("b", (2,))[0] == ord("b")
        assert weights.take("a", (2,))[0] == ord("a")
        with pytest.raises(ModelError, match="c .*b.safetensors"):
            weights.take("c", (2,))
        with pytest.raises(ModelError, match="gone.safetensors"):
            weights.take("d", (2,))


@pytest.mark.parametrize(
    ("tensors", "shape", "quantisation", "code", "words"),
    [
        ({"v": torch.zeros(2)}, (2,), FP8, "missing_tensor", "tensor w is missing"),
        ({"w": torch.zeros(2, 3)}, (3, 2), FP8, "bad_tensor_shape", r"w .*\(2, 3\).*\(3, 2\)"),
        ({"w": torch.zeros(2, dtype=torch.int8)}, (2,), FP8, "bad_quantisation", "int8"),
        ({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, (2, 2), None, "bad_quantisation", "float8_e4m3fn"),
        ({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, (2, 2), FP8, "missing_tensor", "w_scale_inv"),
        (
            {"w": torch.zeros(2, 2).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(2, 1)},
            (2, 2),
            FP8,
            "bad_tensor_shape",
            "w_scale_inv",
        ),
    ],
)
def test_faults(
    tmp_path: Path, tensors: dict[str, torch.Tensor], shape: tuple[int, ...], quantisation: Fp8Blocks | None, code: str, words: str
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with open_folder(tmp_path, quantisation) as weights, pytest.raises(ModelError, match=words) as caught:
        weights.take("w", shape)
    assert caught.value.code == code


def test_missing_corrupt_and_cut_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model.safetensors"):
        open_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="model.safetensors"):
        open_folder(tmp_path)
    save_file({"w": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="model.safetensors"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        open_folder(tmp_path)


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with WeightFolder(tmp_path, None, num_tensors=1, progress=True) as weights:
        weights.take("w", (2,))
    captured = capsys.readouterr()
    assert "loading weights" in captured.err and not captured.out
