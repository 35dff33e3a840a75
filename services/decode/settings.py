"""Owns the reading of the configuration for a decode service: limits, terms, and the way on which KV comes. Knows no request."""

from __future__ import annotations

from collections.abc import Callable

from services.decode.arrivals import Arrivals, HandoffTerms
from services.decode.loan_arrivals import LoanArrivals
from services.decode.policy import DecodeLimits
from services.decode.pool import CacheTerms
from services.decode.producer_rings import ProducerRings
from services.decode.producers import Producers
from services.decode.ring_arrivals import RingArrivals
from services.decode.worker import StepWorker
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.directory import Directory
from services.kv_transfer.loans import BlockLoans
from services.kv_transfer.membership import ReplicaCard


def max_model_tokens(card: ReplicaCard, worker: StepWorker) -> int:
    """The most tokens of prompt and output together."""
    return min(worker.config.max_position_tokens, card.config.model.max_model_tokens or worker.config.max_position_tokens)


def limits_of(card: ReplicaCard) -> DecodeLimits:
    """The policy's limits, from the configuration."""
    section = card.config.decode
    return DecodeLimits(
        num_blocks=section.num_blocks,
        block_tokens=card.config.model.block_tokens,
        watermark_blocks=section.watermark_blocks,
        admit_ahead_tokens=section.admit_ahead_tokens,
        max_batch=section.max_batch,
        max_preemptions=section.max_preemptions,
    )


def cache_of(card: ReplicaCard) -> CacheTerms:
    """What the pool remembers, from the configuration.

    A deterministic GPU remembers prompts alone: a decode step may round a token's KV otherwise than a prefill does, and an answer's bytes
    would depend on whether an earlier turn was still known. A CPU's rows are exact.
    """
    config = card.config
    keeps_answers = not (config.deterministic and config.model.device == "cuda")
    return CacheTerms(max_blocks=config.decode.prefix_cache_blocks, keeps_answers=keeps_answers)


def terms_of(card: ReplicaCard, worker: StepWorker) -> HandoffTerms:
    """What all handles of this replica have in common."""
    transfer = card.config.kv_transfer
    return HandoffTerms(
        boot_id=card.boot_id,
        model_fingerprint=card.model_fingerprint,
        num_layers=worker.config.num_layers,
        num_experts=worker.config.num_experts,
        block_bytes=worker.block_bytes,
        slot_bytes=transfer.slot_bytes,
        write_timeout_s=transfer.write_timeout_s,
        stall_timeout_s=card.config.prefill.hang_timeout_s,
    )


def arrivals_of(
    card: ReplicaCard,
    worker: StepWorker,
    means: TransferAgent | BlockLoans,
    producers: Producers,
    directory: Directory | None,
    on_room: Callable[[], None],
) -> Arrivals:
    """How KV gets to this replica. on_room: slots or blocks came back without a leg of decode's having ended."""
    terms = terms_of(card, worker)
    if isinstance(means, BlockLoans):
        return LoanArrivals(means, terms, on_room)
    config = card.config
    rings = ProducerRings(producers, means, config.decode.ring_slots, config.redis.lease_s, directory, on_room)
    return RingArrivals(means, worker.lander(), rings, terms)
