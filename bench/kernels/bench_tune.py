"""Finds launch configurations by a bounded search and writes the device's table (`duomo bench tune`), and vLLM's by the same budget.

    duomo bench tune --budget-s 60                                       # kernels/duomo_kernels/tuning/<device>.json
    duomo bench tune --ops vllm --budget-s 60                            # bench/results/vllm_tuned.json, what `kernels` compares with

Everything is timed cold, as `duomo bench kernels` times it. The budget is shared out evenly among sizes; what a size does not use goes to
those after it. Entries of other shapes and operations that the file already holds for the same device stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_stopwatch import facts, require_gpu
from bench.kernels.shapes import SHAPES, LayerShape
from duomo_kernels._tuning import FOLDER, file_name, write_table

OPS = ("experts", "fp8", "attention", "vllm")
DEFAULT_OPS = ("experts", "fp8")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
Entry = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The command line, checked."""

    ops: tuple[str, ...]
    shapes: tuple[LayerShape, ...]
    tokens: tuple[int, ...]
    budget_s: float
    device_out: Path | None


def parse(arguments: Sequence[str] | None = None) -> Asked:
    parser = argparse.ArgumentParser(prog="duomo bench tune", description="bounded search for launch configurations on this device")
    parser.add_argument("--ops", default=",".join(DEFAULT_OPS), help=f"of {','.join(OPS)}")
    parser.add_argument("--shapes", default="olmoe,qwen3", help=f"of {','.join(SHAPES)}")
    parser.add_argument("--tokens", default=",".join(map(str, SIZES)), help="numbers of tokens (attention: of sequences)")
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds of search, compilation included")
    parser.add_argument("--device-out", type=Path, help="the table; default: kernels/duomo_kernels/tuning/<device>.json")
    options = parser.parse_args(arguments)
    ops, shapes = tuple(options.ops.split(",")), tuple(options.shapes.split(","))
    for name, found, allowed in (("--ops", ops, OPS), ("--shapes", shapes, tuple(SHAPES))):
        if unknown := set(found) - set(allowed):
            parser.error(f"{name}: {', '.join(sorted(unknown))}: not among {', '.join(allowed)}")
    if not all(word.isdigit() and int(word) > 0 for word in options.tokens.split(",")):
        parser.error(f"--tokens: {options.tokens!r}: whole numbers above 0, such as 1,8,1024")
    if options.budget_s <= 0:
        parser.error("--budget-s is above 0")
    return Asked(
        ops=ops,
        shapes=tuple(SHAPES[name] for name in shapes),
        tokens=tuple(int(word) for word in options.tokens.split(",")),
        budget_s=options.budget_s,
        device_out=options.device_out,
    )


def merged(path: Path, fresh: list[Entry], device: str) -> list[Entry]:
    """Entries of the file that are about something else than the fresh ones, and the fresh ones, in a fixed order."""
    old: list[Entry] = []
    if path.is_file():
        content = json.loads(path.read_text())
        old = content["entries"] if content["device"] == device else []
    replaced = {_about(entry) for entry in fresh}
    return sorted([entry for entry in old if _about(entry) not in replaced] + fresh, key=_about)


def _about(entry: Entry) -> tuple[str, str, str, int]:
    tokens = entry["num_tokens"]
    assert isinstance(tokens, int), entry
    return str(entry["op"]), json.dumps(entry["shape"], sort_keys=True), str(entry["dtype"]), tokens


def main() -> int:
    asked = parse()
    require_gpu("duomo bench tune")
    # Below: what imports Triton and, where it is asked for, vLLM.
    from bench.kernels import peers_vllm
    from bench.kernels.tune_ops import Tuner

    head = facts("tune", 0)
    device = str(head["device"])
    started_s = time.monotonic()
    tuner = Tuner(device=torch.device("cuda", torch.cuda.current_device()), ends_s=started_s + asked.budget_s)
    ours = [op for op in asked.ops if op != "vllm"]
    found = [entry for shape in asked.shapes for entry in tuner.tune(shape, ours, asked.tokens)]
    if found:
        path = asked.device_out or FOLDER / file_name(device)
        write_table(path, head, merged(path, found, device))
        print(f"{len(found)} entries in {time.monotonic() - started_s:.0f} s: {path}")
    if "vllm" in asked.ops:
        if (reason := peers_vllm.why_absent()) is not None:
            print(f"duomo bench tune: vLLM is absent: {reason}", file=sys.stderr)
            return 2
        tuner = Tuner(device=tuner.device, ends_s=time.monotonic() + asked.budget_s)
        configs = {key: sizes for shape in asked.shapes for key, sizes in tuner.tune_vllm(shape, asked.tokens).items()}
        peers_vllm.write_tuned(peers_vllm.TUNED, head, configs)
        print(f"vLLM's configurations: {peers_vllm.TUNED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
