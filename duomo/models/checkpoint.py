"""Owns which tensors a Hugging Face checkpoint holds, by name and shape. Knows no file and no torch.

Every weight of a product is [rows out, columns in].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from duomo.models.config import ModelConfig
from duomo.models.families import FAMILIES


class Entry(NamedTuple):
    """One tensor."""

    name: str
    shape: tuple[int, ...]


class ExpertEntries(NamedTuple):
    gate: Entry
    up: Entry
    down: Entry


class LayerEntries(NamedTuple):
    """One decoder layer. qkv: three entries; qk_norm: of q and of k, none or both; router None: dense."""

    input_norm: Entry
    qkv: tuple[Entry, Entry, Entry]
    qk_norm: tuple[Entry, Entry] | None
    out: Entry
    post_norm: Entry
    router: Entry | None
    experts: tuple[ExpertEntries, ...]


def embed_entry(config: ModelConfig) -> Entry:
    return Entry("model.embed_tokens.weight", (config.vocab, config.hidden))


def norm_entry(config: ModelConfig) -> Entry:
    return Entry("model.norm.weight", (config.hidden,))


def head_entry(config: ModelConfig) -> Entry | None:
    """None: the embeddings are the head."""
    return None if config.ties_embeddings else Entry("lm_head.weight", (config.vocab, config.hidden))


def layer_entries(config: ModelConfig, layer_idx: int) -> LayerEntries:
    """The tensors of one layer."""
    family, prefix, hidden, width = FAMILIES[config.architecture], f"model.layers.{layer_idx}.", config.hidden, config.expert_hidden
    num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm_sizes = {"none": None, "head": (config.head_dim, config.head_dim), "whole": (num_q, num_kv)}[config.qk_norm]

    def attention(name: str, *shape: int) -> Entry:
        return Entry(f"{prefix}self_attn.{name}.weight", shape)

    def expert(index: int) -> ExpertEntries:
        at = prefix + family.experts.format(expert=index)
        return ExpertEntries(
            Entry(at + family.gate, (width, hidden)), Entry(at + family.up, (width, hidden)), Entry(at + family.down, (hidden, width))
        )

    return LayerEntries(
        input_norm=Entry(f"{prefix}input_layernorm.weight", (hidden,)),
        qkv=(attention("q_proj", num_q, hidden), attention("k_proj", num_kv, hidden), attention("v_proj", num_kv, hidden)),
        qk_norm=None if norm_sizes is None else (attention("q_norm", norm_sizes[0]), attention("k_norm", norm_sizes[1])),
        out=attention("o_proj", hidden, num_q),
        post_norm=Entry(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        router=Entry(prefix + family.router, (config.num_experts, hidden)) if config.has_router else None,
        experts=tuple(expert(index) for index in range(config.num_experts)),
    )


def all_entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the checkpoint, scales of quantisation apart."""
    yield embed_entry(config)
    for layer_idx in range(config.num_layers):
        layer = layer_entries(config, layer_idx)
        yield from (layer.input_norm, *layer.qkv, *(layer.qk_norm or ()), layer.out, layer.post_norm)
        yield from () if layer.router is None else (layer.router,)
        for expert in layer.experts:
            yield from expert
    yield norm_entry(config)
    head = head_entry(config)
    yield from () if head is None else (head,)
