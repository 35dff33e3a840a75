"""Pack and land of messages in fp8 against a copy that moves as many bytes, and against messages in the pool's dtype. Floor: those bytes.

Blocks of the pool are read or written once, two bytes a number; the message once, one byte a number and one a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, gpu_bench, interleaved_us, num_sets
from bench.stopwatch import refuse_unless
from duomo_kernels._bounds import bound, error
from duomo_kernels.kv_fp8_pack import kv_fp8_land, kv_fp8_pack, kv_fp8_pack_reference
from duomo_kernels.kv_hash_pack import CORRUPT, GOOD, Seal, hash_scratch, kv_hash_pack, trailer_word
from duomo_kernels.kv_rows_fp8 import packed_bytes

SEAL = Seal(handle_id=1, group=2, message_idx=3, start=bytes(range(32)))
HEAD_DIM = 128
# (name, rows of a block of one layer, blocks, layers): blocks of 64 tokens; MiB of the pool's bf16
CASES = [
    ("OLMoE 2 MiB", 2048, 2, 2),
    ("Qwen3-30B 3 MiB", 512, 4, 6),
    ("OLMoE 16 MiB", 2048, 8, 4),
    ("Qwen3-30B 24 MiB", 512, 32, 6),
    ("OLMoE 128 MiB", 2048, 16, 16),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One call's tensors. message_M has room for either kind of message. copied: so long that a copy moves as many bytes as a pack."""

    pool_LBRD: Tensor
    ids_n: Tensor
    message_M: Tensor
    scratch: Tensor
    flag_1: Tensor
    copied: tuple[Tensor, Tensor]

    @property
    def layers(self) -> range:
        return range(self.pool_LBRD.shape[0])

    def pack(self) -> None:
        kv_fp8_pack(self.pool_LBRD, self.layers, self.ids_n, self.message_M, SEAL, self.scratch)

    def land(self) -> None:
        kv_fp8_land(self.pool_LBRD, self.layers, self.ids_n, self.message_M, SEAL, self.scratch, self.flag_1)

    def pack_model(self) -> None:
        kv_hash_pack(self.pool_LBRD.view(torch.int64).flatten(2), self.layers, self.ids_n, self.message_M, SEAL, self.scratch)

    def copy(self) -> None:
        self.copied[0].copy_(self.copied[1])


def measure(options: Options) -> list[Row]:
    rows = []
    for name, block_rows, num_ids, num_layers in CASES:
        if options.only not in name:
            continue
        wrong = _refuse_if_wrong(_inputs(64, 2, 2))
        num_rows = block_rows * num_ids * num_layers
        num_bytes = 2 * num_rows * HEAD_DIM + packed_bytes(num_rows, HEAD_DIM)
        sets = [_inputs(block_rows, num_ids, num_layers) for _ in range(num_sets(num_bytes))]
        for side, ours in (("pack", Inputs.pack), ("land", Inputs.land)):
            calls: dict[str, list[Call]] = {
                "ours": [partial(ours, s) for s in sets],
                "copy of as many bytes": [partial(Inputs.copy, s) for s in sets],
            }
            if side == "pack":  # to land, a set's message would have to be of both kinds
                calls["in the pool's dtype"] = [partial(Inputs.pack_model, s) for s in sets]
            times = interleaved_us(calls, repeats=options.repeats)
            rows.append(Row(case=f"{side} {name}", times=times, num_bytes=num_bytes, error=wrong))
            for one in sets:
                one.pack()
                one.land()
            refuse_unless(all(int(s.flag_1) == GOOD for s in sets), "kv_fp8_land of what was packed")
    return rows


def _refuse_if_wrong(small: Inputs) -> float:
    """Payload and hash against the definition on a small message, the error of what lands; a flipped bit must be seen. The error."""
    small.pack()
    payload_M, digest = kv_fp8_pack_reference(small.pool_LBRD, small.layers, small.ids_n, SEAL)
    at = trailer_word(len(payload_M)) + 4
    refuse_unless(torch.equal(small.message_M[: len(payload_M)].cpu(), payload_M), "kv_fp8_pack's payload")
    refuse_unless(int(small.message_M[at]) & ((1 << 64) - 1) == digest, "kv_fp8_pack's hash")
    sent = small.pool_LBRD[:, small.ids_n.long()].double()
    small.land()
    wrong = error(small.pool_LBRD[:, small.ids_n.long()], sent)
    refuse_unless(int(small.flag_1) == GOOD and wrong <= bound(torch.float8_e4m3fn), "kv_fp8_land")
    small.message_M[1] ^= 1
    small.land()
    refuse_unless(int(small.flag_1) == CORRUPT, "kv_fp8_land of a corrupt message")
    return wrong


def _inputs(block_rows: int, num_ids: int, num_layers: int) -> Inputs:
    num_blocks, device = 2 * num_ids, torch.device("cuda")  # half of the pool's blocks are somebody else's
    pool_LBRD = torch.randn(num_layers, num_blocks, block_rows, HEAD_DIM, device=device, dtype=torch.bfloat16)
    num_rows = num_layers * num_ids * block_rows
    half = (2 * num_rows * HEAD_DIM + packed_bytes(num_rows, HEAD_DIM)) // 16
    return Inputs(
        pool_LBRD=pool_LBRD,
        ids_n=torch.randperm(num_blocks, device=device)[:num_ids].int(),
        message_M=torch.empty(trailer_word(num_rows * HEAD_DIM // 4) + 8, dtype=torch.int64, device=device),
        scratch=hash_scratch(device),
        flag_1=torch.zeros(1, dtype=torch.int32, device=device),
        copied=(torch.empty(half, dtype=torch.int64, device=device), torch.zeros(half, dtype=torch.int64, device=device)),
    )


if __name__ == "__main__":
    gpu_bench("kv_fp8_pack", measure)
