"""The handoff's benchmark moves real KV between two processes, ends on a wrong byte, and counts what it says it counts."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.serve import bench_handoff
from bench.serve.bench_handoff import Asked, facts, parse, rates
from bench.serve.handoff_plot import draw
from bench.serve.handoff_pools import MIB, NUM_SETS, Pool, Shape, Where, copier, fill_pool, one_block
from bench.serve.handoff_sides import Consumer, Setting, busy_s, spans_of
from bench.serve.handoff_table import table
from duomo.config import TransferSection
from duomo.engine.kv_cache import KvSpec
from duomo.engine.settle import GPU_PROGRESS_DELAY_US
from services.kv_transfer import layout
from services.kv_transfer.sealing import seal

HERE = Where(device="cpu", memory="host")
SMALL = Shape(spec=KvSpec(num_layers=4, num_kv_heads=2, head_dim=32, block_tokens=16), num_blocks=40)  # 1.25 MiB


def asked(**options: object) -> Asked:
    told: dict[str, object] = {"ways": ("auto",), "slots_mib": (1,), "in_flight": (2,), "groups": (1,), "repeats": 1, "require": ""}
    return Asked(producer=HERE, consumer=HERE, net_devices="lo", progress_delay_us=1000, num_write_threads=2, **(told | options))  # type: ignore[arg-type]  # the fields, by name


def test_the_progress_thread_pauses_as_where_it_serves_unless_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def delay_us(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["bench_handoff", *arguments])
        return parse()[0].section("auto").progress_delay_us

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert delay_us() == TransferSection().progress_delay_us > GPU_PROGRESS_DELAY_US == delay_us("--device", "cuda")
    assert delay_us("--device", "cuda", "--progress-delay-us", "20") == 20
    with pytest.raises(SystemExit):
        delay_us("--progress-delay-us", "-1")
    assert "--progress-delay-us -1: microseconds, 0 or more" in capsys.readouterr().err


def test_as_many_threads_copy_as_where_it_serves_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_threads(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["bench_handoff", *arguments])
        return parse()[0].section("auto").num_write_threads

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (num_threads(), num_threads("--device", "cuda"), num_threads("--write-threads", "3")) == (2, 1, 3)


@pytest.fixture
def consumer() -> Iterator[Consumer]:
    section = TransferSection(slot_bytes=128 * 1024, ucx_net_devices="lo")
    setting = Setting(section=section, shape=SMALL, in_flight=3, producer=HERE, consumer=HERE)
    made = Consumer(multiprocessing.get_context("spawn"), setting)
    yield made
    made.close()


def test_handoffs_land_whole_and_a_wrong_byte_ends_the_run(consumer: Consumer) -> None:
    for turn in range(NUM_SETS + 1):
        sample = consumer.handoff(turn, 2)
        assert sample.num_messages == len(spans_of(SMALL, 2, 128 * 1024)) > 6, "more than fit at once: credits came and went"
        assert 0 < sample.transport_s < sample.whole_s and sample.lanes in (("cma/memory",), ("tcp/lo",))
    for message_bytes in (SMALL.num_bytes, 100_000):
        assert consumer.raw_s(1, message_bytes) > 0
    assert consumer.idle_poll_s() > 0
    consumer._expected.tensor[0, SMALL.table(1).start].view(-1)[3] += 1
    with pytest.raises(AssertionError, match="wrong bytes"):
        consumer.handoff(1, 1)
    with pytest.raises(AssertionError, match="wrong bytes"):
        consumer.raw_s(0, MIB)  # raw bytes run through the layers: the first set holds the first layer's blocks


class CardHere(Where):
    """What serves a card, on this processor: its kernels run in Triton's interpreter."""

    @property
    def is_cuda(self) -> bool:
        return True


def test_a_card_s_pool_packs_the_bytes_that_a_cpu_s_pool_and_its_agent_do() -> None:
    pytest.importorskip("triton")
    shape = Shape(spec=KvSpec(num_layers=3, num_kv_heads=2, head_dim=32, block_tokens=16), num_blocks=3)
    pools = [Pool(shape, HERE), Pool(shape, CardHere(device="cpu", memory="device"))]
    for pool in pools:
        fill_pool(pool)
    assert [pool.is_sealed for pool in pools] == [False, True]
    for span in spans_of(shape, 2, 64 * 1024):
        by_cpu = memoryview(bytearray(layout.message_bytes(span.num_bytes)))
        assert pools[0].fill(2, 77, span, by_cpu[: span.num_bytes]) is None
        seal(by_cpu, 77, span)
        room = CardHere(device="cpu", memory="device").allocate()(len(by_cpu)).slice(0, len(by_cpu))
        pools[1].fill(2, 77, span, room)
        assert bytes(torch.as_tensor(room).numpy()) == bytes(by_cpu)


def test_sets_of_blocks_are_used_in_turn() -> None:
    assert [SMALL.table(turn).start for turn in range(5)] == [0, 40, 80, 120, 0] and SMALL.table(-1).start == 120
    assert one_block(SMALL).num_bytes == SMALL.spec.block_bytes
    copied = copier(4096, HERE, HERE)
    assert all(copied(turn) > 0 for turn in range(NUM_SETS + 1))


def test_writes_that_overlap_count_once() -> None:
    assert busy_s([(3.0, 4.0), (0.0, 1.0), (0.5, 1.5), (0.6, 0.7)]) == pytest.approx(2.5)
    assert busy_s([]) == 0.0


def test_ratios_pair_each_repeat_with_the_copy_before_it() -> None:
    row = rates(2 * 10**9, took_s=[1.0, 2.0, 4.0, 8.0], copied_s=[0.5, 2.0, 2.0, 8.0])
    assert row["to_copy"] == pytest.approx(0.75), "of 0.5, 1, 0.5, 1"
    assert row["gb_per_s"] == {"median": pytest.approx(0.75), "quartiles": [pytest.approx(0.5), pytest.approx(1.0)], "best": 2.0}
    assert row["best_to_best_copy"] == pytest.approx(0.5)


def result() -> dict[str, object]:
    speeds = rates(64 * MIB, [0.02, 0.021], [0.01, 0.011])
    way = {
        "what": "what UCX chooses",
        "transport": [{"message_mib": size, "what": "NIXL write", **speeds} for size in (64, 1)],
        "handoffs": [
            {"slot_mib": 1, "in_flight": 2, "num_groups": 1, "num_messages": 64, "lanes": ["cma/memory"]}
            | dict.fromkeys(("whole", "writes", "pack_and_hash"), speeds)
        ],
        "block_kib": 64,
        "block_ms": {"median": 1.0, "p99": 2.0},
        "poll_idle_us": 1.0,
        "hash_gb_per_s": {"median": 4.0, "best": 5.0},
    }
    return {**facts(asked()), "ways": {"auto": way, "tcp": way}}


def test_the_table_says_what_ucx_wrote_by_and_the_file_is_json_that_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "handoff.json"
    file.write_text(json.dumps(result()))
    lines = "\n".join(table(json.loads(file.read_text())))
    for word in ("64 MiB, CPU", "cma/memory", "memcpy, one thread", "NIXL write, 64 MiB", "1 MiB, 2 in flight, 1 groups", "0.51"):
        assert word in lines, lines
    assert [path.suffix for path in draw(file)] == [".png", ".svg"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ways", "auto,shm"], "--ways shm: one or more of auto, tcp"),
        (["--slots-mib", "1,x"], "whole numbers with commas"),
        (["--in-flight", "0"], "numbers from 1 on"),
        (["--groups", "1,17"], "--groups up to 16"),
        (["--device", "cuda", "--cards", "0,99"], "one or two of the"),
        (["--write-threads", "0"], "--write-threads 0: 1 to 64"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_handoff", *options])
    with pytest.raises(SystemExit):
        bench_handoff.parse()
    assert said in capsys.readouterr().err


def test_tcp_is_required_of_the_way_that_is_tcp() -> None:
    assert asked(require="cma").section("auto").require_transport == "cma"
    assert (asked().section("tcp").ucx_tls, asked(require="cma").section("tcp").require_transport) == ("tcp,self", "tcp")
