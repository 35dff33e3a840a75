"""The whole model against transformers in float32, filled by hand from the same files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.reference.tiny_moe import build_reference, greedy_tokens
from duomo.engine.monolith import GenerateRequest, generate
from duomo.errors import ModelError
from duomo.models.qwen3_moe import Model, load_model
from duomo.wire.values import Sampling

TINY_MOE = Path(__file__).parents[2] / "models" / "tiny-moe"


def prompt(num_tokens: int) -> list[int]:
    return torch.randint(3, 8192, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens)).tolist()


def test_greedy_tokens_equal_transformers(model: Model) -> None:
    """Byte-exact tokens where no call is close; longer runs and the rule for close calls are in the system tests."""
    reference = build_reference(TINY_MOE)
    prompts = [prompt(n) for n in (1, 2, 15, 16, 17, 63, 257)]
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    ours = generate(model, [GenerateRequest(prompt_ids=ids, sampling=sampling) for ids in prompts])
    for ids, tokens in zip(prompts, ours, strict=True):
        assert [token.token_id for token in tokens] == greedy_tokens(reference, ids, 12), f"prompt of {len(ids)} tokens"


@pytest.mark.slow
def test_long_prompts_equal_transformers(model: Model) -> None:
    reference = build_reference(TINY_MOE)
    prompts = [prompt(n) for n in (700, 1023, 1500)]
    ours = generate(
        model, [GenerateRequest(prompt_ids=ids, sampling=Sampling(max_tokens=64, temperature=0.0, ignore_eos=True)) for ids in prompts]
    )
    for ids, tokens in zip(prompts, ours, strict=True):
        assert [token.token_id for token in tokens] == greedy_tokens(reference, ids, 64), f"prompt of {len(ids)} tokens"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    shutil.copytree(TINY_MOE, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.mlp.experts.7.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match="layers.3.mlp.experts.7.up_proj") as caught:
        load_model(tmp_path / "copy")
    assert caught.value.code == "missing_tensor"


def test_untied_embeddings_are_read(tmp_path: Path, model: Model) -> None:
    shutil.copytree(TINY_MOE, tmp_path / "copy")
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(ModelError, match="lm_head.weight"):
        load_model(tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(8192, 256)}, file)
    loaded = load_model(tmp_path / "copy")
    assert (loaded.lm_head_DV == 1).all() and torch.equal(loaded.embed_VD, model.embed_VD)


def test_what_runs_is_known(model: Model) -> None:
    assert model.gemm.name in ("chain", "tile") and model.is_row_exact
