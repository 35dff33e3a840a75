"""PURE: decides how the cards of a host are divided between the replicas of two pools: a card each, or parts of one. Knows no device.

Each pool has its own engine and its own copy of the weights. Two replicas on one card are a layout for tests: each plans with its share as
if that were the card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from duomo.config import DuomoConfig
from duomo.engine.memory_plan import DeviceBytes
from duomo.errors import ConfigError

Pool = Literal["prefill", "decode"]
POOLS: tuple[Pool, Pool] = ("prefill", "decode")
CONTEXT_BYTES = 700_000_000  # assumed, of a process on a card that others use too: CUDA's context and the kernels loaded into it
PREFILL_SHARE = 0.4  # of a card that both use: both hold the weights, decode holds the KV of what runs


def shares(config: DuomoConfig, num_cards: int | None) -> dict[str, object]:
    """prefill.gpu_share and decode.gpu_share as options for config.changed. num_cards: of this host; None: nobody has counted them.

    Raises ConfigError where there are too few cards.
    """
    named = {pool: gpu_share(config, pool) for pool in POOLS}
    prefill, decode = named["prefill"], named["decode"]
    replicas = config.prefill.replicas + config.decode.replicas
    if prefill is None and decode is None:
        if num_cards is None or num_cards >= replicas:
            prefill = 1.0
        elif replicas == len(POOLS):
            prefill = PREFILL_SHARE
        else:
            raise ConfigError(
                f"prefill.replicas ({config.prefill.replicas}) and decode.replicas ({config.decode.replicas}) need a card each, "
                f"{replicas} in all; this host shows {num_cards}. One of each pool can share a card"
            )
    if prefill is None:
        assert decode is not None
        prefill = 1.0 if decode == 1.0 else round(1.0 - decode, 6)
    if decode is None:
        decode = 1.0 if prefill == 1.0 else round(1.0 - prefill, 6)
    if num_cards is not None and prefill == decode == 1.0 and num_cards < replicas:
        raise ConfigError(
            f"prefill.gpu_share and decode.gpu_share are 1, a card each: {replicas} cards are needed, this host shows {num_cards}"
        )
    return {"prefill.gpu_share": prefill, "decode.gpu_share": decode}


def gpu_share(config: DuomoConfig, pool: Pool) -> float | None:
    """As configured."""
    return (config.prefill if pool == "prefill" else config.decode).gpu_share


def share_of(device: DeviceBytes, share: float) -> DeviceBytes:
    """What a process plans with: the card, or its part of one that others use too, whatever they hold of it already."""
    if share == 1.0:
        return device
    total = int(device.total * share)
    return DeviceBytes(total=total, free=max(0, total - CONTEXT_BYTES))


def refuse_crowded(config: DuomoConfig, device: DeviceBytes, starting: Sequence[Pool] = POOLS) -> None:
    """Raises ConfigError where what the shares of `starting` use of one card is not free now: of both pools before either has started, or
    of the one that starts beside the other."""
    parts = {pool: gpu_share(config, pool) or 1.0 for pool in POOLS}
    if set(parts.values()) == {1.0}:
        return
    needed = int(sum(parts[pool] for pool in starting) * device.total * config.gpu_memory_fraction)
    if needed > device.free:
        said = " and ".join(f"{pool}.gpu_share {parts[pool]:g}" for pool in starting)
        raise ConfigError(
            f"{said} {'is' if len(starting) == 1 else 'are'} {needed / 1e9:.1f} GB of a card of "
            f"{device.total / 1e9:.1f} GB at gpu_memory_fraction {config.gpu_memory_fraction:g}, "
            f"but {device.free / 1e9:.1f} GB of it are free",
            code="does_not_fit",
        )


def refuse_scaled(config: DuomoConfig, replicas: Mapping[str, int], num_cards: float) -> None:
    """Raises ConfigError where a running system of two pools has no card for so many replicas of each. num_cards: of its
    cluster, whoever uses them."""
    counts = " and ".join(f"{replicas[pool]} of {pool}" for pool in POOLS)
    parts = [f"{pool}.gpu_share is {share:g}" for pool in POOLS if (share := gpu_share(config, pool)) is not None and share < 1]
    if parts and any(replicas[pool] > 1 for pool in POOLS):
        raise ConfigError(f"{counts} replicas have no card: {' and '.join(parts)}, which is one of each pool on one card", code="no_card")
    needed = sum(replicas[pool] for pool in POOLS)
    if not parts and needed > num_cards:
        raise ConfigError(
            f"{counts} replicas need a card each, {needed} in all; the Ray cluster has {num_cards:g}: scale the other pool down first, "
            "or start it with more (prefill.replicas, decode.replicas)",
            code="no_card",
        )
