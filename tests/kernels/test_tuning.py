"""Tables of measured configurations: nearest lookup, refusal of tables that say something else, tables of the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from duomo_kernels import _decode_pieces, _tuning
from duomo_kernels._decode_pieces import DecodeShape, config_from
from duomo_kernels._tuning import FOLDER, TuningTableError, file_name, nearest, read_table, shape_key, tuned, write_table

HEAD = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11", "triton": "3.6.0", "driver": "580", "commit": "abc", "date": "2026-11-22"}
SHAPE = {"num_experts": 64, "top_k": 8, "dim": 2048, "hidden": 1024}


def entry(num_tokens: int, **changes: object) -> dict[str, Any]:
    config = {"path": "gemm", "up": {"block_m": num_tokens, "use_tma": True}, "split": 2}
    found = {"op": "experts", "shape": SHAPE, "dtype": "bf16", "num_tokens": num_tokens, "config": config, "us": 10.5, "heuristic_us": 12}
    return found | changes


def written(path: Path, *entries: object) -> Path:
    path.write_text(json.dumps(HEAD | {"entries": list(entries)}))
    return path


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 1), (1, 1), (2, 1), (5, 16), (16, 16), (22, 16), (23, 32), (24, 32), (9000, 32)])
def test_the_nearest_ratio_wins(tmp_path: Path, num_tokens: int, expected: int) -> None:
    table = read_table(written(tmp_path / "a.json", entry(32), entry(1), entry(16)))
    (entries,) = table.values()
    got = nearest(entries, num_tokens)
    assert got is not None and got["up"] == {"block_m": expected, "use_tma": True}


def test_another_shape_or_dtype_has_no_entry(tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "a.json", entry(32)))
    assert ("experts", shape_key(dict(reversed(SHAPE.items()))), "bf16") in table
    assert ("experts", shape_key(SHAPE | {"dim": 4096}), "bf16") not in table and ("experts", shape_key(SHAPE), "fp8") not in table
    assert nearest((), 8) is None


def test_the_device_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(_tuning, "_device_name", lambda index: f"Some GPU, rev. {index}")
    _tuning._table.cache_clear()
    written(tmp_path / "some_gpu_rev_1.json", entry(8))
    try:
        assert tuned("experts", SHAPE, "bf16", 8, torch.device("cuda:1")) is not None
        assert tuned("experts", SHAPE, "bf16", 8, torch.device("cuda:0")) is None
        assert tuned("experts", SHAPE, "bf16", 8, torch.device("cpu")) is None
    finally:
        _tuning._table.cache_clear()
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ([{"op": "experts"}], "entry 0: expected exactly the keys"),
        ([entry(8), entry(16, us="fast")], "entry 1: us: 'fast' is no float"),
        ([entry(8, us=True)], "us: True"),
        ([entry(0)], "num_tokens: 0 is not above 0"),
        ([entry(8, shape={})], "shape"),
        ([entry(8, shape={"dim": "2048"})], "shape"),
        ([entry(8, config={})], "config: empty"),
        ([entry(8, config={"up": {"deep": {"x": 1}}})], "config.up"),
        ([entry(8, config={"up": None})], "config.up"),
        ([entry(8), entry(8)], "entry 1: a second one"),
        (["x"], "entry 0"),
    ],
)
def test_what_no_table_is_refused(tmp_path: Path, entries: list[object], word: str) -> None:
    with pytest.raises(TuningTableError, match=word) as refused:
        read_table(written(tmp_path / "bad.json", *entries))
    assert "bad.json" in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": []}', "\x00"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(TuningTableError, match="bad.json"):
        read_table(tmp_path / "bad.json")
    with pytest.raises(TuningTableError):
        read_table(tmp_path / "absent.json")


def test_a_table_is_written_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    write_table(path, HEAD | {"repeats": 50}, [entry(8), entry(16)])
    (entries,) = read_table(path).values()
    assert [each.num_tokens for each in entries] == [8, 16] and entries[0].heuristic_us == 12
    before = path.read_text()
    with pytest.raises(TuningTableError):
        write_table(path, HEAD, [entry(8), entry(8)])
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_decode_attention_follows_its_table_but_not_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(_tuning, "_device_name", lambda index: f"gpu {index}")
    monkeypatch.setattr(_decode_pieces, "num_sms", lambda device: 132)
    _tuning._table.cache_clear()
    here, elsewhere = torch.device("cuda:0"), torch.device("cuda:1")
    sizes = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    configs: dict[int, dict[str, int | str]] = {
        batch: {"block_keys": keys, "num_stages": 3, "num_warps": 2, "programs_per_sm": programs, "merge": "kernel", "late": 8}
        for batch, keys, programs in ((1, 32, 4), (64, 256, 1))
    }
    written(tmp_path / "gpu_0.json", *(entry(b, op="decode_attention", shape=sizes, config=config) for b, config in configs.items()))

    def shape(batch: int, **changes: Any) -> DecodeShape:
        some: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_tokens": 16, "max_blocks": 8}
        return DecodeShape(num_sequences=batch, **some | changes)

    try:
        for batch, nearest_batch in ((1, 1), (7, 1), (9, 64), (500, 64)):
            assert shape(batch).config(here) == config_from(configs[nearest_batch]) != shape(batch).heuristic(here)
        for other in (shape(7, chunk_tokens=512), shape(7, head_dim=128), shape(7, num_heads=4)):
            assert other.config(here) == other.heuristic(here)
        assert shape(7).config(elsewhere) == shape(7).heuristic(elsewhere)
    finally:
        _tuning._table.cache_clear()


@pytest.mark.parametrize(
    "wrong",
    [{"block_keys": 48}, {"block_keys": 32}, {"num_warps": 3}, {"num_stages": 0}, {"programs_per_sm": 5}, {"merge": "vote"}],
    ids=str,
)
def test_a_decode_configuration_is_checked(wrong: dict[str, int | str]) -> None:
    right: dict[str, int | str] = {"block_keys": 64, "num_stages": 3, "num_warps": 4, "programs_per_sm": 2, "merge": "ticket"}
    assert config_from(right).block_keys == 64
    with pytest.raises(AssertionError):
        config_from(right | wrong)
    with pytest.raises(TypeError):
        config_from(right | {"block_m": 16})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_the_tables_of_the_repository_can_be_read(path: Path) -> None:
    assert read_table(path) and path.name == file_name(json.loads(path.read_text())["device"])
