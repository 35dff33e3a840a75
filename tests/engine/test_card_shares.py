"""A card each where there are enough, parts of one where it is the only one, and refusals with figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from duomo.config import DuomoConfig, load_config
from duomo.engine.card_shares import CONTEXT_BYTES, refuse_crowded, refuse_scaled, share_of, shares
from duomo.engine.memory_plan import DeviceBytes
from duomo.errors import ConfigError

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-moe"
CARD = DeviceBytes(total=80_000_000_000, free=79_000_000_000)


def config(**options: object) -> DuomoConfig:
    return load_config(
        None, {"model.path": str(TINY), "layout": "split"} | {name.replace("__", "."): value for name, value in options.items()}
    )


@pytest.mark.parametrize(
    ("options", "num_cards", "expected"),
    [
        ({}, 1, (0.4, 0.6)),
        ({}, 2, (1.0, 1.0)),
        ({}, None, (1.0, 1.0)),
        ({"prefill__replicas": 2}, 3, (1.0, 1.0)),
        ({"prefill__gpu_share": 0.3}, 1, (0.3, 0.7)),
        ({"decode__gpu_share": 0.5}, 8, (0.5, 0.5)),
        ({"decode__gpu_share": 1.0}, 2, (1.0, 1.0)),
        ({"prefill__gpu_share": 0.3, "decode__gpu_share": 0.3}, 1, (0.3, 0.3)),
    ],
)
def test_shares(options: dict[str, object], num_cards: int | None, expected: tuple[float, float]) -> None:
    assert shares(config(**options), num_cards) == {"prefill.gpu_share": expected[0], "decode.gpu_share": expected[1]}


@pytest.mark.parametrize(
    ("options", "num_cards", "words"),
    [
        ({"prefill__replicas": 2}, 2, r"prefill.replicas \(2\) and decode.replicas \(1\) need a card each, 3 in all; this host shows 2"),
        ({"prefill__gpu_share": 1.0}, 1, "are 1, a card each: 2 cards are needed, this host shows 1"),
    ],
)
def test_too_few_cards_are_refused(options: dict[str, object], num_cards: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shares(config(**options), num_cards)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"prefill__gpu_share": 0.6, "decode__gpu_share": 0.5},
            r"prefill.gpu_share \(0.6\) and decode.gpu_share \(0.5\) are more than one card",
        ),
        ({"prefill__gpu_share": 0.6, "decode__replicas": 2}, "decode.replicas 2: with a card for each leave gpu_share out"),
        ({"decode__gpu_share": 0.6, "layout": "colocated"}, "decode.gpu_share is 0.6, but layout is colocated"),
        ({"decode__gpu_share": 0.0}, "decode.gpu_share"),
    ],
)
def test_shares_that_contradict_the_rest_are_refused_by_name(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**options)


def test_a_share_is_planned_as_a_card_of_its_own() -> None:
    assert share_of(CARD, 1.0) is CARD
    part = share_of(CARD, 0.25)
    assert (part.total, part.free) == (20_000_000_000, 20_000_000_000 - CONTEXT_BYTES)
    assert share_of(CARD, 0.001).free == 0


def test_a_card_that_others_fill_is_refused_before_either_starts() -> None:
    shared = config(prefill__gpu_share=0.5, decode__gpu_share=0.5)
    refuse_crowded(shared, CARD)
    refuse_crowded(config(), DeviceBytes(total=CARD.total, free=1))
    with pytest.raises(ConfigError, match="72.0 GB of a card of 80.0 GB.*but 71.0 GB of it are free") as caught:
        refuse_crowded(shared, DeviceBytes(total=CARD.total, free=71_000_000_000))
    assert caught.value.code == "does_not_fit"


def test_replicas_are_scaled_up_to_the_cards_that_the_system_has() -> None:
    alone = config(prefill__gpu_share=1.0, decode__gpu_share=1.0)
    for replicas in ({"prefill": 1, "decode": 3}, {"prefill": 3, "decode": 1}, {"prefill": 1, "decode": 1}):
        refuse_scaled(alone, replicas, 4.0)
    with pytest.raises(
        ConfigError, match="2 of prefill and 3 of decode replicas need a card each, 5 in all; the Ray cluster has 4"
    ) as caught:
        refuse_scaled(alone, {"prefill": 2, "decode": 3}, 4.0)
    assert caught.value.code == "no_card"


def test_a_card_that_both_pools_share_holds_one_of_each() -> None:
    shared = config(prefill__gpu_share=0.4, decode__gpu_share=0.6)
    refuse_scaled(shared, {"prefill": 1, "decode": 1}, 1.0)
    with pytest.raises(ConfigError, match="prefill.gpu_share is 0.4 and decode.gpu_share is 0.6, which is one of each pool on one card"):
        refuse_scaled(shared, {"prefill": 1, "decode": 2}, 8.0)
