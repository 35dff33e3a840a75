"""Owns a folder that vLLM serves with dummy weights: a model's config.json and a made-up tokenizer of as many words. Knows no server.

python -m bench.serve.make_vllm_model bench/engine/models/qwen3-30b-a3b /tmp/vllm_model
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "<s>", "</s>")


def make(config_folder: Path, out: Path) -> None:
    """Write into `out`, which is made. Raises FileNotFoundError, KeyError for a folder that is no model's."""
    text = (config_folder / "config.json").read_text()
    num_words = int(json.loads(text)["vocab_size"])
    words = {word: number for number, word in enumerate((*SPECIAL, *(f"t{number} " for number in range(len(SPECIAL), num_words))))}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": SPECIAL[0]},
    }
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(text)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "tokenizer_config.json").write_text(
        json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 40960})
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
