"""Owns the random weights inside vLLM's worker: a loader that fills its model from our named tensors. Knows no case and no clock.

vLLM imports this module by name in whatever process its worker runs in (worker_extension_cls), before it loads the model; the import has
to register the loader, which is why there is work at import here and nowhere else. Its model's own load_weights takes the tensors, as from
a checkpoint, and vLLM then arranges them for its kernels as it does with any.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader import register_model_loader  # type: ignore[import-not-found]  # the peer: never a dependency
from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # type: ignore[import-not-found]  # the peer: never a dependency

from bench.engine.engine_cases import SEED, STD
from bench.engine.engine_vllm import LOAD_FORMAT
from duomo.models.config import load_config
from duomo.models.gpu_random import random_checkpoint
from duomo_kernels._weights_fp8 import quantise_blocks_fp8

HELD = ("weight", "weight_scale_inv")  # how names of what a checkpoint holds end; vLLM has scales of its own for the KV cache
QUANTISED = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.", ".experts.")  # what our engine turns to fp8 on load


def named_tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as a checkpoint of this folder's config.json would hold them: in fp8 with its scales, if it says so."""
    config = load_config(folder, needs_weights=False)
    for name, wide in random_checkpoint(config, device=device, dtype=torch.bfloat16, seed=SEED, std=STD):
        if config.quantisation is None or not any(part in name for part in QUANTISED):
            yield name, wide
            continue
        stored_1NK, scale_1nk = quantise_blocks_fp8(wide[None])
        yield name, stored_1NK[0]
        yield f"{name}_scale_inv", scale_1nk[0]


@register_model_loader(LOAD_FORMAT)
class RandomLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is absent where types are checked
    """vLLM's loader of random models."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to fetch."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Every weight of the model gets numbers, or this fails: a forgotten one would leave what the memory held before."""
        outer = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # vLLM's is the model's while it loads: ours draws as it does in our own engine
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            loaded = set(model.load_weights(named_tensors(Path(model_config.model), device)))  # type: ignore[operator]  # a method, says vLLM
        finally:
            torch.set_default_dtype(outer)
        torch.cuda.empty_cache()  # vLLM's pool of KV gets what is free now
        missing = {name for name, _ in model.named_parameters() if name.endswith(HELD)} - loaded
        assert not missing, f"{len(missing)} parameters of vLLM's model got no numbers, such as {sorted(missing)[:3]}"


class RandomWeights:
    """The worker's extension: its methods become the worker's own. vLLM imports this module for it."""

    def scale_embedding(self, factor: float) -> None:
        """Multiply the tokens' embeddings in place, where compiled code and graphs read them; engine_cases.py says why."""
        (embedding,) = (
            weight
            for name, weight in self.get_model().named_parameters()  # type: ignore[attr-defined]  # the worker's, which this class becomes part of
            if name.endswith("embed_tokens.weight")
        )
        embedding.data.mul_(factor)
