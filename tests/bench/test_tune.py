"""The bounded search and what `duomo bench tune` does without a GPU: command line, candidates, winners, tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.kernels import bench_tune, tile_spaces
from bench.kernels.bench_tune import merged, parse
from bench.kernels.shapes import SHAPES
from bench.kernels.tile_search import MARGIN, Variant, search
from bench.kernels.tune_ops import config_of
from duomo_kernels._decode_pieces import DecodeConfig
from duomo_kernels._tuning import read_table, write_table
from duomo_kernels.expert_direct import DirectTiles
from duomo_kernels.moe_layer import gemm_tiles, plan_from

HEAD = {"device": "GPU", "torch": "2", "triton": "3", "driver": "5", "commit": "c", "date": "d"}


def variant(name: str, out: Tensor | Exception) -> Variant[str]:
    def call() -> Tensor:
        if isinstance(out, Exception):
            raise out
        return out

    return Variant(name, [call] * 4)


class Clock:
    """Gives each variant the time planned for it, by the order in which they are searched."""

    def __init__(self, us: Mapping[str, float], order: Sequence[str]) -> None:
        self.us, self.order, self.rounds = us, order, []

    def __call__(self, sides: Mapping[str, Sequence[Callable[[], object]]], repeats: int) -> dict[str, float]:
        self.rounds.append([self.order[int(name)] for name in sides])
        return {name: self.us[self.order[int(name)]] for name in sides}


RIGHT = torch.ones(3, 5, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("us", "winner"),
    [
        ({"usual": 10, "b": 9, "c": 8}, "c"),
        ({"usual": 10, "b": 10 * (1 - MARGIN / 2), "c": 11}, "usual"),
        ({"usual": 1, "b": 2, "c": 3}, "usual"),
    ],
)
def test_the_heuristic_stays_unless_beaten_clearly(us: dict[str, float], winner: str) -> None:
    names = ["usual", "b", "c"]
    found = search(variant("usual", RIGHT), [variant(n, RIGHT) for n in names[1:]], time.monotonic() + 60, Clock(us, names))
    assert found.plan == winner and found.heuristic_us == us["usual"] and found.us == round(us[winner], 3) and found.num_tried == 3


def test_what_fails_or_is_wrong_is_no_candidate() -> None:
    others = [
        variant("refused", AssertionError("block_m")),
        variant("too large", RuntimeError("shared memory")),
        variant("wrong", RIGHT * 1.1),
        variant("not written", torch.full_like(RIGHT, torch.nan)),
        variant("good", RIGHT),
    ]
    names = ["usual", *(other.plan for other in others)]
    clock = Clock(dict.fromkeys(names, 1.0) | {"usual": 5.0, "good": 4.0}, names)
    found = search(variant("usual", RIGHT), others, time.monotonic() + 60, clock)
    assert found.plan == "good" and found.num_tried == 2 and clock.rounds[0] == ["usual", "good"]


def test_the_first_round_ends_at_the_deadline() -> None:
    names = ["usual", *(f"v{i}" for i in range(40))]
    clock = Clock({name: 40.0 - i for i, name in enumerate(names)}, names)
    found = search(variant("usual", RIGHT), [variant(n, RIGHT) for n in names[1:]], time.monotonic() - 1, clock)
    assert len(clock.rounds) == 2 and found.num_tried < 10


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 256, 1024, 16384])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_spaces_are_small_and_fit(name: str, tokens: int) -> None:
    shape = SHAPES[name]
    rows = tile_spaces.heights(tokens, shape.top_k, shape.num_experts)
    assert 1 <= len(rows) <= 2 and all(row in (16, 32, 64, 128) for row in rows)
    for block_m in rows:
        for space in (tile_spaces.up_tiles, tile_spaces.down_tiles, tile_spaces.up_tiles_fp8, tile_spaces.down_tiles_fp8):
            tiles = space(block_m)
            assert 3 <= len(tiles) <= 40 and len(set(tiles)) == len(tiles) and all(tile.block_m == block_m for tile in tiles)


def test_direct_and_decode_spaces() -> None:
    assert len(set(tile_spaces.direct_tiles(1))) == len(tile_spaces.direct_tiles(1)) <= 20
    usual = DecodeConfig(block_keys=64, num_stages=4, num_warps=4, programs_per_sm=2, merge="ticket")
    assert usual in tile_spaces.decode_configs(usual) and len(tile_spaces.decode_configs(usual)) <= 24


@pytest.mark.parametrize("plan", [DirectTiles(down_rows=4), gemm_tiles(4.0), gemm_tiles(4000.0)])
def test_a_found_plan_is_what_the_layer_reads_back(plan: object, tmp_path: Path) -> None:
    config = config_of(plan)  # type: ignore[arg-type]  # parametrised as object
    entry = {"op": "experts", "shape": {"dim": 8}, "dtype": "bf16", "num_tokens": 4, "config": config, "us": 1.0, "heuristic_us": 1.5}
    write_table(tmp_path / "gpu.json", HEAD, [entry])
    ((read,),) = read_table(tmp_path / "gpu.json").values()
    assert plan_from(read.config) == plan


def test_fresh_entries_replace_their_like_alone(tmp_path: Path) -> None:
    def entry(tokens: int, us: float) -> dict[str, object]:
        return {
            "op": "experts",
            "shape": {"dim": 8},
            "dtype": "bf16",
            "num_tokens": tokens,
            "config": {"a": 1},
            "us": us,
            "heuristic_us": 9,
        }

    path = tmp_path / "gpu.json"
    assert merged(path, [entry(8, 1.0)], "GPU") == [entry(8, 1.0)]
    path.write_text(json.dumps(HEAD | {"entries": [entry(8, 5.0), entry(16, 6.0)]}))
    assert merged(path, [entry(8, 1.0), entry(1, 2.0)], "GPU") == [entry(1, 2.0), entry(8, 1.0), entry(16, 6.0)]
    assert merged(path, [entry(8, 1.0)], "another GPU") == [entry(8, 1.0)]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked = parse(["--ops", "experts,vllm", "--shapes", "qwen3", "--tokens", "1,64", "--budget-s", "9", "--device-out", "x.json"])
    assert asked.ops == ("experts", "vllm") and asked.tokens == (1, 64) and asked.budget_s == 9 and asked.device_out == Path("x.json")
    for wrong in (["--ops", "gemm"], ["--shapes", "x"], ["--tokens", "0"], ["--budget-s", "0"]):
        with pytest.raises(SystemExit) as ended:
            parse(wrong)
        assert ended.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_tune"])
    with pytest.raises(SystemExit) as ended:
        bench_tune.main()
    assert ended.value.code == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err
