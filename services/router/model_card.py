"""What the gateway knows of the served model: its name, limits and size. Knows no weights."""

from __future__ import annotations

from dataclasses import dataclass

from duomo.config import ModelSection
from duomo.errors import ConfigError
from duomo.models.config import served_config


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Of one model folder. context_tokens: prompt and completion together."""

    name: str
    fingerprint: str
    context_tokens: int
    vocab_size: int
    total_params: int
    active_params: int
    num_experts: int
    experts_per_token: int


def read_model_card(section: ModelSection) -> ModelCard:
    """Raises ModelError where the folder cannot be served, ConfigError where model.max_model_tokens exceeds what the model can do."""
    config = served_config(section)
    limit = section.max_model_tokens or config.max_position_tokens
    if limit > config.max_position_tokens:
        raise ConfigError(f"model.max_model_tokens is {limit}, but {section.path} reads at most {config.max_position_tokens} tokens")
    return ModelCard(
        name=section.served_name,
        fingerprint=config.fingerprint,
        context_tokens=limit,
        vocab_size=config.vocab,
        total_params=config.total_params,
        active_params=config.active_params,
        num_experts=config.num_experts,
        experts_per_token=config.top_k,
    )
