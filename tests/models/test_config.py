"""What a model folder says: both spellings, counts, fingerprint, and every refusal named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from duomo.errors import ModelError
from duomo.models.config import fingerprint, load_config

TINY_MOE = Path(__file__).parents[2] / "models" / "tiny-moe"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(TINY_MOE, tmp_path / "copy")
    return tmp_path / "copy"


def change(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    edit(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def test_the_embedded_model() -> None:
    config = load_config(TINY_MOE)
    assert (config.num_layers, config.hidden, config.num_experts, config.top_k, config.vocab) == (8, 256, 16, 4, 8192)
    assert config.total_params == 16_291_072
    assert config.active_params == 6_853_888
    assert config.eos_ids == (2,) and config.max_position_tokens == 2048 and config.rope_theta == 10000.0
    assert config.quantisation is not None and config.quantisation.block == (128, 128)


def test_published_spellings_read_the_same(folder: Path) -> None:
    def published(raw: dict[str, object]) -> None:
        raw["num_experts"] = raw.pop("num_local_experts")
        raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]  # type: ignore[index]  # a JSON object

    before = load_config(folder)
    change(folder, published)
    after = load_config(folder)
    assert (after.num_experts, after.rope_theta) == (before.num_experts, before.rope_theta)


def test_eos_ids_of_both_files_count(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert load_config(folder).eos_ids == (2, 7)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda raw: raw.update(architectures=["GPT2LMHeadModel"]), ["GPT2LMHeadModel", "Qwen3MoeForCausalLM", "LlamaForCausalLM"]),
        (lambda raw: raw.pop("hidden_size"), ["hidden_size"]),
        (lambda raw: raw.pop("num_local_experts"), ["num_experts", "num_local_experts"]),
        (lambda raw: raw.update(num_hidden_layers="8"), ["num_hidden_layers", "'8'"]),
        (lambda raw: raw.update(num_hidden_layers=0), ["num_hidden_layers"]),
        (lambda raw: raw.update(num_key_value_heads=3), ["num_key_value_heads"]),
        (lambda raw: raw.update(num_experts_per_tok=17), ["num_experts_per_tok"]),
        (lambda raw: raw.update(hidden_act="gelu"), ["hidden_act", "gelu"]),
        (lambda raw: raw.update(attention_bias=True), ["attention_bias"]),
        (lambda raw: raw.update(mlp_only_layers=[0]), ["mlp_only_layers"]),
        (lambda raw: raw.update(rope_parameters={"rope_theta": 1e4, "rope_type": "yarn"}), ["rope_type", "yarn"]),
        (lambda raw: raw.update(quantization_config={"quant_method": "awq"}), ["awq", "fp8 e4m3"]),
        (lambda raw: raw["quantization_config"].update(fmt="e5m2"), ["e5m2"]),
    ],
)
def test_refusals_name_what_is_wrong(folder: Path, edit: Callable[[dict[str, object]], object], words: list[str]) -> None:
    change(folder, edit)
    with pytest.raises(ModelError) as caught:
        load_config(folder)
    assert all(word in caught.value.detail for word in words), caught.value.detail


def test_missing_and_broken_files(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json"):
        load_config(folder)
    with pytest.raises(ModelError, match="nowhere"):
        load_config(folder / "nowhere")


def test_fingerprint_is_of_the_content_not_the_place(folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(TINY_MOE)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(folder) != fingerprint(TINY_MOE)


def test_large_files_are_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duomo.models.config.WHOLE_FILE_BYTES", 1024 * 1024)
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert fingerprint(folder) != before


def test_no_torch_is_loaded() -> None:
    code = "import sys, duomo.models.config; sys.exit('torch' in sys.modules)"
    root = str(TINY_MOE.parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": f"{root}:{root}/kernels"}, timeout=60).returncode == 0
