"""How many replicas each pool would need for the load that this gateway sees now. Places nothing: operators and autoscalers read it.

Pure: views in, two numbers out (scaling.py has the rule). Requests that wait count against the pool that keeps them waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.router.policy import DecodeView, Need, PrefillView, decode_blocks, has_decode_room, has_prefill_room
from services.router.scaling import DecodeLoad, PrefillLoad, ScalingLimits, desired_decode, desired_prefill

# Above this share of its blocks or of its batch a decode replica has no room for a burst.
_DECODE_TARGET: Final = 0.75
_MAX_REPLICAS: Final = 256  # as `duomo scale`


@dataclass(frozen=True, slots=True)
class DesiredReplicas:
    """Of each pool."""

    prefill: int
    decode: int


def desired_replicas(
    prefills: Sequence[PrefillView], decodes: Sequence[DecodeView], waiting: Sequence[Need], wave_tokens: int
) -> DesiredReplicas:
    """wave_tokens: a prefill replica with more prompt tokens than one wave waiting is one too few. Draining replicas are not counted."""
    open_prefills = [view for view in prefills if view.is_open]
    open_decodes = [view for view in decodes if view.is_open]
    head = waiting[0] if waiting else None
    tokens = [PrefillLoad(queued_tokens=view.queued_tokens) for view in open_prefills]
    if head is not None and tokens and not any(has_prefill_room(view, head) for view in open_prefills):
        extra = sum(need.num_tokens for need in waiting)
        tokens[0] = PrefillLoad(queued_tokens=tokens[0].queued_tokens + extra)
    blocks = [_decode_load(view) for view in open_decodes]
    if head is not None and blocks and not any(has_decode_room(view, head) for view in open_decodes):
        extra = sum(decode_blocks(need, open_decodes[0].block_tokens) for need in waiting)
        blocks[0] = DecodeLoad(used_blocks=blocks[0].used_blocks, num_blocks=blocks[0].num_blocks, queued_blocks=extra)
    return DesiredReplicas(
        desired_prefill(tokens, ScalingLimits(min_replicas=1, max_replicas=_MAX_REPLICAS, target=wave_tokens)),
        desired_decode(blocks, ScalingLimits(min_replicas=1, max_replicas=_MAX_REPLICAS, target=_DECODE_TARGET)),
    )


def _decode_load(view: DecodeView) -> DecodeLoad:
    """The fuller of memory and batch."""
    batch_blocks = view.num_choices * view.num_blocks // view.max_choices
    return DecodeLoad(used_blocks=max(view.num_blocks - view.free_blocks, batch_blocks), num_blocks=view.num_blocks)
