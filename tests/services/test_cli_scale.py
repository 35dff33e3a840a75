"""What an operator asks of two pools at once: in which order it is sent, and what is said where a part of it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from duomo.config import load_config
from duomo.engine.card_shares import refuse_scaled
from duomo.errors import ConfigError
from services.admin import SOCKET_NAME, AdminCommand, AdminSocket, Replicas
from services.cli_scale import scale_pools


class ThreeCards:
    """A system with a card for each of three replicas; its replicas come and go at once."""

    def __init__(self, prefill: int, decode: int) -> None:
        self.wanted = {"prefill": prefill, "decode": decode}
        self.states: Replicas = {"prefill": {"STOPPING": 3}, "decode": {"STOPPING": 3}}  # they drain, and are not counted
        self._config = load_config(None, {"model.path": "m", "prefill.gpu_share": 1.0, "decode.gpu_share": 1.0})

    def run(self, command: AdminCommand) -> Replicas:
        if command.command == "scale":
            assert command.pool is not None and command.replicas is not None
            wanted = self.wanted | {command.pool: command.replicas}
            refuse_scaled(self._config, wanted, 3)
            self.wanted = wanted
            self.states = {"prefill": {}, "decode": {}}
        return {pool: self.states[pool] | {"RUNNING": count} for pool, count in self.wanted.items()}


@pytest.fixture
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ThreeCards]:
    made = ThreeCards(**request.param)
    door = AdminSocket(tmp_path / SOCKET_NAME, made.run)
    door.start()
    yield made
    door.close()


@pytest.mark.parametrize(
    ("system", "asked"),
    [
        ({"prefill": 1, "decode": 2}, {"prefill": 2, "decode": 1}),
        ({"prefill": 2, "decode": 1}, {"prefill": 1, "decode": 2}),
        ({"prefill": 2, "decode": 1}, {"prefill": 1, "decode": None}),
    ],
    indirect=["system"],
)
def test_the_pool_that_shrinks_gives_its_card_to_the_other(system: ThreeCards, asked: dict[str, int | None], tmp_path: Path) -> None:
    assert scale_pools(asked, 1, tmp_path, wait_s=10) == 0
    assert system.wanted == system.wanted | {pool: count for pool, count in asked.items() if count is not None}


@pytest.mark.parametrize("system", [{"prefill": 1, "decode": 2}], indirect=True)
def test_a_refusal_names_what_was_taken_before_it(system: ThreeCards, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 of prefill and 1 of decode replicas need a card each.*; --decode 1 was taken and holds"):
        scale_pools({"prefill": 3, "decode": 1}, 1, tmp_path, wait_s=10)
    assert system.wanted == {"prefill": 1, "decode": 1}
    with pytest.raises(ConfigError, match="4 in all") as refused:
        scale_pools({"prefill": 1, "decode": 3}, 1, tmp_path, wait_s=10)
    assert "--prefill 1 was taken" in str(refused.value)
    with pytest.raises(ConfigError, match="5 in all") as refused:
        scale_pools({"prefill": 4, "decode": None}, 1, tmp_path, wait_s=10)
    assert "was taken" not in str(refused.value)
