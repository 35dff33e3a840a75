"""Owns the list of what a prefill or decode replica can hold, name by name: what is not empty at rest was leaked. Knows no request.

Looks inside on purpose: a leg, credit or lease that nobody ends shows in no report until memory runs out.
"""

from __future__ import annotations

from services.decode.ring_arrivals import RingArrivals
from services.decode.service import DecodeService
from services.kv_transfer.agent import TransferAgent
from services.prefill.ring_handoffs import RingHandoffs
from services.prefill.service import PrefillService


def held_by_prefill(service: PrefillService) -> dict[str, object]:
    """Legs, handles, leases, blocks, credits and send slots of a prefill replica."""
    book, pusher = service._book, _agent_of(service)._pusher
    assert isinstance(book.handoffs, RingHandoffs)
    blocks = book.blocks.manager
    return {
        "legs": [(leg.key, leg.stage, leg.is_over, leg.handoff) for leg in book._legs.values()],
        "handoffs": list(book.handoffs._legs),
        "waiting": list(book.waves.waiting),
        "blocks": blocks.num_blocks - blocks.num_free - blocks.num_cached,
        "fences to tell": [fence for peer in book.peers._peers.values() for fence in peer.fences],
        "jobs": [pending.key for pending in pusher._pending],
        "writes": len(pusher._in_flight),
        "credits": list(pusher._writer.handles),
        "busy slots": list(pusher._writer.busy),
        "open fences": list(pusher._fences),
        "send slots": pusher._slots.num_taken,
        "spans": service.report().num_open_spans,
    }


def held_by_decode(service: DecodeService) -> dict[str, object]:
    """Legs, announcements, handles, tables, slots, rings and blocks of a decode replica."""
    handoffs, arrivals = service._handoffs, service._arrivals
    assert isinstance(arrivals, RingArrivals)
    landing, blocks = arrivals._agent._landing, service.pool.manager
    rings = list(landing._rings())
    counts = arrivals.counts()
    return {
        "legs": [(leg.key, leg.state, sorted(leg.landed), len(leg.spans)) for leg in service._legs.values()],
        "announcements": list(handoffs._early),
        "waiting": len(handoffs._for_blocks) + len(handoffs._for_slots),
        "landing": list(handoffs._landing),
        "tables": list(arrivals._tables._tables),
        "awaited": [key for ring in rings for key in ring.awaited],
        "expected": [handle_id for ring in rings for handle_id in ring.spans],
        "handles": counts.num_open_handles,
        "slots": counts.num_slots - counts.num_free_slots,
        "quarantined": counts.num_quarantined_slots,
        "retired rings": counts.num_retired_rings,
        "rings kept": len(landing._kept),
        "lost producers": list(arrivals._rings._lost),
        "blocks": blocks.num_blocks - blocks.num_free - blocks.num_cached,
        "holders": list(service.pool.holders),
    }


def _agent_of(service: PrefillService) -> TransferAgent:
    assert isinstance(service._means, TransferAgent)
    return service._means
