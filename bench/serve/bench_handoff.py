"""Measures the handoff of KV between two processes: rate by message size and messages in flight, beside a plain copy in the same run.

    duomo bench handoff                                       # a CPU's 64 MiB: what UCX chooses (CMA), then TCP; a table
    duomo bench handoff --slots-mib 1,4 --in-flight 4,16      # these message sizes and windows alone
    duomo bench handoff --device cuda --cards 0,1 --slots-mib 1,8,64 --groups 1,2,4,8      # 192 MiB from card 0 to card 1
    duomo bench handoff --device cuda --cards 0,1 --memory host                            # by way of the host's memory
    duomo bench handoff --out bench/results/handoff_cpu.json  # and the plot beside it

A producer and a consumer process with the agents, pools and landers that serve. A repeat is a plain copy (one thread's memcpy; between
cards torch's copy_) and then the way that is measured, so that what else the machine does falls on both; a ratio is the median of the
repeats' ratios. What landed is compared with what was sent, every time: a wrong byte ends the run without a report, and so does another
transport than --require asks for. Files need nothing; plots need matplotlib (pip install 'duomo[bench]').
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.axes import draw_beside
from bench.serve.handoff_plot import draw
from bench.serve.handoff_pools import CPU_SHAPE, GPU_SHAPE, MIB, NUM_SETS, Shape, Where, copier, one_block
from bench.serve.handoff_sides import Consumer, Setting
from bench.serve.handoff_table import table
from bench.serve.host_facts import commit, cpu_name
from duomo.config import MAX_WRITE_THREADS, TransferSection
from duomo.engine.settle import GPU_PROGRESS_DELAY_US, GPU_WRITE_THREADS
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.transport_nixl_config import import_nixl

WARMUPS = NUM_SETS  # every set of blocks has been touched, every connection made
WAYS = {"auto": "what UCX chooses", "tcp": "TCP alone (UCX_TLS)"}
Row = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is measured. net_devices: UCX_NET_DEVICES. require: kv_transfer.require_transport of the way `auto`.

    progress_delay_us, num_write_threads: kv_transfer's.
    """

    producer: Where
    consumer: Where
    ways: tuple[str, ...]
    slots_mib: tuple[int, ...]
    in_flight: tuple[int, ...]
    groups: tuple[int, ...]
    repeats: int
    net_devices: str
    require: str
    progress_delay_us: int
    num_write_threads: int

    @property
    def shape(self) -> Shape:
        return GPU_SHAPE if self.consumer.is_cuda else CPU_SHAPE

    def section(self, way: str) -> TransferSection:
        tls = ("tcp,self,cuda_copy" if self.consumer.is_cuda else "tcp,self") if way == "tcp" else ""
        required = "tcp" if way == "tcp" else self.require
        ucx = {"ucx_tls": tls, "ucx_net_devices": self.net_devices, "require_transport": required}
        told = {"progress_delay_us": self.progress_delay_us, "num_write_threads": self.num_write_threads}
        return TransferSection.model_validate(ucx | told)

    def setting(self, way: str, *, slot_mib: int = 1, in_flight: int = 1) -> Setting:
        section = self.section(way).model_copy(update={"slot_bytes": slot_mib * MIB})
        return Setting(section=section, shape=self.shape, in_flight=in_flight, producer=self.producer, consumer=self.consumer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to hand a prompt over."""

    slot_mib: int
    in_flight: int
    num_groups: int


def main() -> None:
    asked, out = parse()
    context = multiprocessing.get_context("spawn")
    measured: Row = {}
    for way in asked.ways:  # a process for each: UCX reads part of its environment once
        ours, theirs = context.Pipe()
        process = context.Process(target=measure_way, args=(theirs, asked, way))
        process.start()
        theirs.close()
        try:
            measured[way] = ours.recv()
        except EOFError:
            process.join()
            raise SystemExit(f"{way}: nothing is reported; its process ended with {process.exitcode}") from None
        process.join()
    report = facts(asked) | {"ways": measured}
    print("\n".join(table(report)))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
        draw_beside(out, draw)


def measure_way(pipe: Connection, asked: Asked, way: str) -> None:
    """In a process of its own, which is the consumer."""
    torch.set_num_threads(1)
    copy_s = copier(asked.shape.num_bytes, asked.producer, asked.consumer)
    transport = measure_transport(asked, way, copy_s)
    handoffs = [row for slot_mib in asked.slots_mib for row in measure_handoffs(asked, way, slot_mib, copy_s)]
    pipe.send({"what": WAYS[way], "transport": transport, "handoffs": handoffs, **measure_small(asked, way)})


def measure_transport(asked: Asked, way: str, copy_s: Callable[[int], float]) -> list[Row]:
    """Writes alone, out of and into memory that lies in no cache: as one write, and as messages. Of a CPU also what CMA's call gives."""
    sizes = [asked.shape.num_bytes, *(slot_mib * MIB for slot_mib in asked.slots_mib)]
    kinds = (False, True) if way == "auto" and not asked.consumer.is_cuda else (False,)
    took: dict[tuple[int, bool], list[tuple[float, float]]] = {(size, kind): [] for size in sizes for kind in kinds}
    consumer = Consumer(multiprocessing.get_context("spawn"), asked.setting(way, slot_mib=max(sizes) // MIB))
    try:
        for repeat in range(-WARMUPS, asked.repeats):
            for (size, kind), pairs in took.items():
                pair = copy_s(repeat), consumer.raw_s(repeat, size, by_syscall=kind)
                if repeat >= 0:
                    pairs.append(pair)
    finally:
        consumer.close()
    return [
        {
            "message_mib": size // MIB,
            "what": "process_vm_writev" if kind else "NIXL write",
            **rates(asked.shape.num_bytes, [second for _, second in pairs], [first for first, _ in pairs]),
        }
        for (size, kind), pairs in took.items()
    ]


def measure_handoffs(asked: Asked, way: str, slot_mib: int, copy_s: Callable[[int], float]) -> list[Row]:
    """Whole handoffs with messages of slot_mib: by window, and by number of layer groups."""
    cases = [Case(slot_mib=slot_mib, in_flight=in_flight, num_groups=asked.groups[0]) for in_flight in asked.in_flight]
    cases += [replace(cases[-1], num_groups=num_groups) for num_groups in asked.groups[1:]]
    rows: list[Row] = []
    for case in cases:
        setting = asked.setting(way, slot_mib=slot_mib, in_flight=case.in_flight)
        consumer = Consumer(multiprocessing.get_context("spawn"), setting)
        pairs = []
        try:
            for repeat in range(-WARMUPS, asked.repeats):
                pair = copy_s(repeat), consumer.handoff(repeat, case.num_groups)
                if repeat >= 0:
                    pairs.append(pair)
        finally:
            consumer.close()
        copied_s, samples, num_bytes = [first for first, _ in pairs], [sample for _, sample in pairs], asked.shape.num_bytes
        rows.append(
            {
                **asdict(case),
                "num_messages": samples[0].num_messages,
                "lanes": sorted({lane for sample in samples for lane in sample.lanes}),
                "whole": rates(num_bytes, [sample.whole_s for sample in samples], copied_s),
                "writes": rates(num_bytes, [sample.transport_s for sample in samples], copied_s),
                "pack_and_hash": rates(num_bytes, [sample.pack_s for sample in samples], copied_s),
            }
        )
    return rows


def measure_small(asked: Asked, way: str) -> Row:
    """A block of one layer from its grant to its place, the cost of an idle poll, and the rate of a processor's hash."""
    setting = replace(asked.setting(way), shape=one_block(asked.shape))
    consumer = Consumer(multiprocessing.get_context("spawn"), setting)
    try:
        for turn in range(WARMUPS):
            consumer.handoff(turn, 1)
        single_s = sorted(consumer.handoff(turn, 1).whole_s for turn in range(20 * asked.repeats))
        idle_s = min(consumer.idle_poll_s() for _ in range(asked.repeats))
    finally:
        consumer.close()
    payload, hash_s = memoryview(bytes(MIB)), []
    for message_idx in range(16 * asked.repeats):
        started_s = time.perf_counter()
        message_hash(payload, 1, 1, message_idx)
        hash_s.append(time.perf_counter() - started_s)
    return {
        "block_kib": setting.shape.num_bytes // 1024,
        "block_ms": {"median": 1e3 * statistics.median(single_s), "p99": 1e3 * single_s[int(0.99 * len(single_s))]},
        "poll_idle_us": 1e6 * idle_s,
        "hash_gb_per_s": {"median": MIB / statistics.median(hash_s) / 1e9, "best": MIB / min(hash_s) / 1e9},
    }


def rates(num_bytes: int, took_s: list[float], copied_s: list[float]) -> Row:
    """GB/s: median, quartiles, best; and the median of each repeat's ratio to the copy before it."""
    by_rate = sorted(num_bytes / second / 1e9 for second in took_s)
    quarter = len(by_rate) // 4
    return {
        "gb_per_s": {"median": statistics.median(by_rate), "quartiles": [by_rate[quarter], by_rate[-1 - quarter]], "best": by_rate[-1]},
        "copy_gb_per_s": {"median": num_bytes / statistics.median(copied_s) / 1e9, "best": num_bytes / min(copied_s) / 1e9},
        "to_copy": statistics.median(copy_s / second for copy_s, second in zip(copied_s, took_s, strict=True)),
        "best_to_best_copy": min(copied_s) / min(took_s),
    }


def facts(asked: Asked) -> Row:
    cards = sorted({where.device for where in (asked.producer, asked.consumer) if where.is_cuda})
    return {
        "benchmark": "handoff",
        "device": ", ".join(f"{card} {torch.cuda.get_device_name(card)}" for card in cards) or "CPU",
        "copy": "torch copy_ from card to card" if cards else "memcpy, one thread",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of whatever else runs: ratios to the best copy bear it best
        "nice": os.nice(0),
        "kernel": platform.release(),
        "huge_pages": huge_pages(),
        "versions": {"nixl": import_nixl(TransferSection())[1], **{name: importlib.metadata.version(name) for name in ("torch", "numpy")}},
        "asked": asdict(asked),
        "handoff_bytes": asked.shape.num_bytes,
    }


def huge_pages() -> str:
    """The kernel's setting for memory that asks for them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "none"


def parse() -> tuple[Asked, Path | None]:
    parser = argparse.ArgumentParser(prog="duomo bench handoff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cards", type=numbers, default=(0, 1), metavar="P,D", help="cards of producer and consumer; one number: both")
    parser.add_argument("--memory", choices=("device", "host"), default="device", help="kv_transfer.memory: where a card's rings lie")
    parser.add_argument("--slots-mib", type=positive, default=(1, 4, 16), metavar="N,N", help="message sizes (kv_transfer.slot_bytes)")
    parser.add_argument("--in-flight", type=positive, default=(2, 8), metavar="N,N", help="messages that may be on their way at once")
    parser.add_argument("--groups", type=positive, default=(1, 8), metavar="N,N", help="layer groups that a handoff is cut into")
    parser.add_argument("--ways", default="auto,tcp", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--require", default="", help="kv_transfer.require_transport of the way auto, such as cma or cuda_ipc")
    parser.add_argument("--progress-delay-us", type=int, help="kv_transfer.progress_delay_us; left out: what serves on such a device")
    parser.add_argument("--write-threads", type=int, help="kv_transfer.num_write_threads; left out: what serves on such a device")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--net-devices", default=os.environ.get("UCX_NET_DEVICES", "lo"), help="UCX_NET_DEVICES")
    parser.add_argument("--out", type=Path, help="a result file; the plot lies beside it")
    options = parser.parse_args()
    ways = tuple(options.ways.split(","))
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--ways {','.join(unknown)}: one or more of {', '.join(WAYS)}")
    if len(options.cards) > 2 or (options.device == "cuda" and max(options.cards) >= torch.cuda.device_count()):
        parser.error(f"--cards {options.cards}: one or two of the {torch.cuda.device_count()} cards here")
    places = [f"cuda:{card}" if options.device == "cuda" else "cpu" for card in (options.cards[0], options.cards[-1])]
    asked = Asked(
        producer=Where(device=places[0], memory=options.memory),
        consumer=Where(device=places[1], memory=options.memory),
        ways=ways,
        slots_mib=options.slots_mib,
        in_flight=options.in_flight,
        groups=options.groups,
        repeats=options.repeats,
        net_devices=options.net_devices,
        require=options.require,
        progress_delay_us=served_delay_us(options.device) if options.progress_delay_us is None else options.progress_delay_us,
        num_write_threads=served_threads(options.device) if options.write_threads is None else options.write_threads,
    )
    if asked.progress_delay_us < 0:
        parser.error(f"--progress-delay-us {asked.progress_delay_us}: microseconds, 0 or more")
    if not 1 <= asked.num_write_threads <= MAX_WRITE_THREADS:
        parser.error(f"--write-threads {asked.num_write_threads}: 1 to {MAX_WRITE_THREADS}")
    if max(asked.groups) > asked.shape.spec.num_layers or asked.repeats < 1:
        parser.error(f"--groups up to {asked.shape.spec.num_layers} (the layers handed over), --repeats at least 1")
    return asked, options.out


def served_delay_us(device: str) -> int:
    """Of a service that is told nothing of it."""
    return GPU_PROGRESS_DELAY_US if device == "cuda" else TransferSection().progress_delay_us


def served_threads(device: str) -> int:
    """Of a service that is told nothing of them."""
    return GPU_WRITE_THREADS if device == "cuda" else TransferSection().num_write_threads


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between, such as 1,4,16") from None


def positive(text: str) -> tuple[int, ...]:
    found = numbers(text)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 on, such as 1,4,16")
    return found


if __name__ == "__main__":
    main()
