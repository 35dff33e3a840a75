"""Owns decode steps on one GPU: two captured graphs for each bucket of rows, a copy up and one back a step. Knows no request or policy.

    launch    copy the plan up; replay forward (decode_inputs, embedding, layers, logits); have masks made; replay sampler; copy the answer
              back; mark it
    wait      for that mark

Step n + 1 is launched before step n has been waited for: it finds the tokens of step n where the sampler left them. Everything is queued on
the stream that is current at launch, so block copies and landed keys queued there between two steps lie between them on the device too.

Rows are padded to a bucket. Live rows stand in front: dead ones route to no expert, write no key and sample no token.

Legend: R rows of a bucket, V vocabulary, L layers, K experts a token, W blocks of a table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from duomo.engine.decode_buckets import bucket_of, buckets_up_to
from duomo.engine.decode_step import DecodeLimits, DecodeStep, Joining, StepResult
from duomo.engine.gpu_compile_ahead import compiling_ahead
from duomo.engine.gpu_decode_attention import GpuDecodeAttention
from duomo.engine.gpu_graphs import GpuGraphs
from duomo.engine.gpu_host_ring import HostBuffer, HostRing
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_sample_rows import FillMasks, SampleKind
from duomo.engine.gpu_sampler import ALL_KINDS, CAPTURED_KINDS, GpuSampler
from duomo.engine.gpu_step_plan import GpuStepPlan
from duomo.models.gpu_decoder import GpuDecoder, KvPlace, RowState
from duomo_kernels.decode_inputs import DecodeInputs, decode_inputs, empty_decode_inputs


def _nobody(masks_MW: NDArray[np.int32]) -> None:
    raise AssertionError("rows with a grammar, and nobody fills their masks")


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step under way. Its answer is kept until as many further steps as there are host buffers have been launched."""

    num_rows: int
    kind: SampleKind
    _decode: GpuDecode
    _buffer: HostBuffer
    _turn: int

    def is_over(self) -> bool:
        """Whether wait() would return at once."""
        return self._buffer.turn != self._turn or self._buffer.is_over()  # wait() says that it is too late

    def wait(self) -> StepResult:
        """Return when the step is over. Gives the core away meanwhile."""
        self._buffer.wait()
        assert self._buffer.turn == self._turn, "waited for too late: a later step took this one's buffer"
        return self._decode.result(self)


class GpuDecode:
    """A decoder over a pool of KV, step by step. One thread at a time."""

    def __init__(self, decoder: GpuDecoder, cache: GpuKvCache, limits: DecodeLimits) -> None:
        assert decoder.is_deterministic == limits.is_deterministic, "decoder and limits disagree on is_deterministic"
        self.decoder, self.cache, self.limits = decoder, cache, limits
        config, device = decoder.config, cache.device
        self.buckets = buckets_up_to(limits.max_batch)
        max_rows, width = self.buckets[-1], _table_width(limits.max_model_tokens, cache.spec.block_tokens)
        self._plan = GpuStepPlan(max_rows, width, cache.spec.block_tokens, device)
        self._inputs = empty_decode_inputs(max_rows, width, device)
        self._inputs.token_id_R.zero_()  # a row of the embeddings, also for kernels that are compiled before any has run
        self._attention = GpuDecodeAttention(config, cache, self.buckets, width, is_deterministic=limits.is_deterministic)
        self._logits_RV = torch.empty(max_rows, config.vocab, dtype=torch.float32, device=device)
        self._routed_words = config.num_layers * config.top_k
        self._sampler = GpuSampler(max_rows, config.vocab, max_rows * self._routed_words, device)
        self._ring = HostRing(self._sampler.num_host_words, device)
        self.graphs = GpuGraphs(device)

    @torch.inference_mode()
    def capture(self, *, progress: bool = False) -> None:
        """Compile everything that a step may run, by threads; run it once; capture it, largest bucket first. Touches no KV."""
        with self.graphs.capturing():
            self._plan.clear()
            self._sampler.rows.warm()
            with compiling_ahead():
                for bucket in self.buckets:
                    self._warm(bucket)
            for bucket in tqdm(
                self.buckets[::-1], desc="capturing decode steps", unit="bucket", file=sys.stderr, disable=not progress, leave=False
            ):
                self._warm(bucket)
                self.graphs.capture(bucket, partial(self._forward, bucket))
                for kind in CAPTURED_KINDS:
                    self.graphs.capture((bucket, kind), partial(self._sample, bucket, kind))

    @torch.inference_mode()
    def launch(self, step: DecodeStep, fill_masks: FillMasks = _nobody) -> PendingStep:
        """Queue one step and return: its rows' sources are rows of the step launched before.

        fill_masks: where rows have a grammar, called with their masks once the logits are on their way; it may wait for the step before.
        """
        num_rows = len(step.rows)
        bucket = bucket_of(num_rows)
        assert bucket <= self.buckets[-1], f"{num_rows} rows, captured for {self.buckets[-1]}"
        kind = self._sampler.rows.place(step.rows)
        self._plan.upload(step, bucket)
        self.graphs.run(bucket, partial(self._forward, bucket))
        self._sampler.rows.fill_masks(fill_masks)
        self.graphs.run((bucket, kind), partial(self._sample, bucket, kind))
        buffer = self._ring.take()
        self._sampler.download(buffer, bucket * self._routed_words, kind)
        return PendingStep(num_rows, kind, self, buffer, buffer.turn)

    @torch.inference_mode()
    def rehearse(self, step: DecodeStep) -> None:
        """Do what launch() of this step of rows that join does on the host, up to its first launch. No step is under way.

        A step's way to its launch is a few hundred lines of Python that have not run for a while where none was under way, and take three
        to seven times as long as those that just ran: whoever waits for a step to launch has it rehearsed.
        """
        assert all(isinstance(row.source, Joining) for row in step.rows), "nobody goes on from a rehearsed step"
        self._sampler.rows.place(step.rows)
        self._plan.upload(step, bucket_of(len(step.rows)))

    def enqueue_copies(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Queue copies of whole blocks, (source, destination), behind the steps launched so far and before the next."""
        self.cache.copy_blocks(pairs)

    def result(self, pending: PendingStep) -> StepResult:
        """Of a step that is over: PendingStep.wait() asks for it."""
        buffer, num_rows, bucket = pending._buffer, pending.num_rows, bucket_of(pending.num_rows)
        config = self.decoder.config
        landed = self._sampler.landed_extra(buffer, bucket * self._routed_words)
        routed_LRK = landed.reshape(config.num_layers, bucket, config.top_k)[:, :num_rows].astype(np.int16)
        return StepResult(
            token_id_R=self._sampler.tokens(buffer, num_rows),
            errors=self._sampler.errors(buffer, num_rows),
            routed_LRK=routed_LRK,
            logprobs=self._sampler.logprobs(buffer, num_rows) if pending.kind.has_logprobs else None,
        )

    def _forward(self, bucket: int) -> None:
        """From the plan and the tokens of the step before to logits and routed ids; only launches."""
        config = self.decoder.config
        inputs = _first_rows(self._inputs, bucket)
        decode_inputs(self._plan.rows(bucket), self._sampler.token_R, self.cache.spec.block_tokens, out=inputs)
        plan = self._attention.begin(bucket, inputs.table_RW, inputs.length_R)
        rows = RowState(self.decoder.embed(inputs.token_id_R))
        place = KvPlace(slot_T=inputs.slot_R, position_T=inputs.position_R, num_valid=inputs.num_valid)
        routed_ids = [
            self.decoder.layer(layer_idx, rows, place, self.cache.layer(layer_idx), self._attention.of_layer(layer_idx, plan))
            for layer_idx in range(config.num_layers)
        ]
        self.decoder.logits(rows, out=self._logits_RV[:bucket])
        # all layers' ids in one launch: a copy behind each layer would stand between kernels that start each other early
        routed_LRK = self._sampler.extra[: bucket * self._routed_words].view(config.num_layers, bucket, config.top_k)
        torch.stack(routed_ids, out=routed_LRK)

    def _warm(self, bucket: int) -> None:
        """What a step of this bucket launches; what depends on the vocabulary alone, in the largest."""
        self._forward(bucket)
        for kind in ALL_KINDS if bucket == self.buckets[-1] else CAPTURED_KINDS:
            self._sample(bucket, kind)

    def _sample(self, bucket: int, kind: SampleKind) -> None:
        next_position_R = self._inputs.next_position_R[:bucket]
        self._sampler.run(self._logits_RV[:bucket], next_position_R, self._inputs.num_valid, kind)


def _table_width(max_model_tokens: int, block_tokens: int) -> int:
    """Blocks of the longest sequence; a multiple of 4, so that every row of a table starts at a multiple of 16 bytes."""
    return -(-max_model_tokens // (4 * block_tokens)) * 4


def _first_rows(inputs: DecodeInputs, bucket: int) -> DecodeInputs:
    return DecodeInputs(
        token_id_R=inputs.token_id_R[:bucket],
        position_R=inputs.position_R[:bucket],
        slot_R=inputs.slot_R[:bucket],
        length_R=inputs.length_R[:bucket],
        table_RW=inputs.table_RW[:bucket],
        next_position_R=inputs.next_position_R[:bucket],
        num_valid=inputs.num_valid,
    )
