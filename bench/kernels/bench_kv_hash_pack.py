"""Pack with hash and scatter with verification of messages, against torch's gather and scatter without a hash. Floor: every byte twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, gpu_bench, interleaved_us, num_sets
from bench.stopwatch import refuse_unless
from duomo_kernels.kv_hash_pack import (
    CORRUPT,
    GOOD,
    Seal,
    cut_to_heads,
    hash_scratch,
    kv_hash_pack,
    kv_hash_pack_reference,
    kv_verify_scatter,
    trailer_word,
)

SEAL = Seal(handle_id=1, group=2, message_idx=3, start=bytes(range(32)))
# (name, words of a block of one layer, blocks, layers): blocks of 16 tokens in bf16
CASES = [
    ("OLMoE 1 MiB", 8192, 4, 4),
    ("Qwen3-30B 4 MiB", 4096, 22, 6),
    ("OLMoE 16 MiB", 8192, 64, 4),
    ("Qwen3-30B 24 MiB", 4096, 128, 6),
    ("OLMoE 128 MiB", 8192, 128, 16),
]
# the same, but some heads of each block alone: (which of them, of how many), as another tensor parallelism asks for
CUT_CASES = [
    ("OLMoE 16 MiB, half its heads", 8192, 128, 4, (range(8, 16), 16)),
    ("Qwen3-30B 4 MiB, one head of four", 4096, 88, 6, (range(1, 2), 4)),
]
ALL_HEADS = (range(1), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One call's tensors."""

    pool_LBW: Tensor
    ids_n: Tensor
    message_M: Tensor
    scratch: Tensor
    flag_1: Tensor

    @property
    def layers(self) -> range:
        return range(self.pool_LBW.shape[0])

    def pack(self) -> None:
        kv_hash_pack(self.pool_LBW, self.layers, self.ids_n, self.message_M, SEAL, self.scratch)

    def scatter(self) -> None:
        kv_verify_scatter(self.pool_LBW, self.layers, self.ids_n, self.message_M, SEAL, self.scratch, self.flag_1)

    def payload(self) -> Tensor:
        shape = (len(self.layers), len(self.ids_n), *self.pool_LBW.shape[2:])
        return self.message_M[: math.prod(shape)].view(shape)

    def gather(self) -> None:
        torch.index_select(self.pool_LBW, 1, self.ids_n, out=self.payload())

    def spread(self) -> None:
        self.pool_LBW.index_copy_(1, self.ids_n.long(), self.payload())


def measure(options: Options) -> list[Row]:
    rows = []
    for name, width, num_ids, num_layers, (heads, num_heads) in [*((*case, ALL_HEADS) for case in CASES), *CUT_CASES]:
        num_words = width * num_ids * num_layers * len(heads) // num_heads
        if options.only not in name:
            continue
        _refuse_if_wrong(_inputs(width, 2, 2, heads, num_heads))
        sets = [_inputs(width, num_ids, num_layers, heads, num_heads) for _ in range(num_sets(16 * num_words))]
        for side, ours, peer in (("pack", Inputs.pack, Inputs.gather), ("scatter", Inputs.scatter, Inputs.spread)):
            calls: dict[str, list[Call]] = {"ours": [partial(ours, s) for s in sets], "torch, no hash": [partial(peer, s) for s in sets]}
            times = interleaved_us(calls, repeats=options.repeats)
            rows.append(Row(case=f"{side} {name}", times=times, num_bytes=16 * num_words))
        refuse_unless(all(int(s.flag_1) == GOOD for s in sets), "kv_verify_scatter of what was packed")
    return rows


def _refuse_if_wrong(small: Inputs) -> None:
    """Payload and hash against Python on a small message; a flipped bit must be seen."""
    small.pack()
    payload_M, digest = kv_hash_pack_reference(small.pool_LBW, small.layers, small.ids_n, SEAL)
    at = trailer_word(len(payload_M)) + 4
    refuse_unless(torch.equal(small.message_M[: len(payload_M)].cpu(), payload_M), "kv_hash_pack's payload")
    refuse_unless(int(small.message_M[at]) & ((1 << 64) - 1) == digest, "kv_hash_pack's hash")
    small.scatter()
    refuse_unless(int(small.flag_1) == GOOD, "kv_verify_scatter")
    small.message_M[1] ^= 1
    small.scatter()
    refuse_unless(int(small.flag_1) == CORRUPT, "kv_verify_scatter of a corrupt message")


def _inputs(width: int, num_ids: int, num_layers: int, heads: range, num_heads: int) -> Inputs:
    num_blocks = 2 * num_ids  # half of the pool's blocks are somebody else's
    pool_LBW = torch.randint(-(2**63), 2**63 - 1, (num_layers, num_blocks, width), device="cuda")
    return Inputs(
        pool_LBW=cut_to_heads(pool_LBW, heads, num_heads),
        ids_n=torch.randperm(num_blocks, device="cuda")[:num_ids].int(),
        message_M=torch.empty(trailer_word(width * num_ids * num_layers) + 8, dtype=torch.int64, device="cuda"),
        scratch=hash_scratch(torch.device("cuda")),
        flag_1=torch.zeros(1, dtype=torch.int32, device="cuda"),
    )


if __name__ == "__main__":
    gpu_bench("kv_hash_pack", measure)
