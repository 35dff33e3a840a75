"""Owns what the policy of prefill may know: prompts that wait, live waves, limits. PURE: knows no decision, tensor or socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duomo.config import PrefillSection
from services.prefill.wave_costs import CostCurve

Key = tuple[str, int]  # (request id, attempt)
Mode = Literal["layered", "chunked", "whole"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    """A prompt that is not in a wave yet. peer: boot id of the decode replica that grants. is_reachable: its ring is attached."""

    key: Key
    peer: str
    num_tokens: int
    num_blocks: int
    priority: int
    arrived_s: float
    deadline_s: float
    is_reachable: bool
    announced_s: float | None = None
    is_granted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a configuration asks for, and this replica has.

    num_blocks: all blocks of this replica. max_live_tokens: rows of all live waves together, what memory between pieces is planned for; a
    wave alone is not held to it. max_ttft_s: gateway.max_ttft_s, after which a first token is worth nothing; None: none is told. The
    others: duomo.config.PrefillSection.
    """

    max_wave_tokens: int
    max_wave_prompts: int
    num_groups: int
    num_blocks: int
    grant_timeout_s: float
    max_live_tokens: int
    mode: Mode
    chunk_tokens: int
    long_chunk_tokens: int
    piece_target_s: float
    ttft_floor_s: float
    ttft_stretch: float
    max_ttft_s: float | None = None

    @classmethod
    def of(
        cls, section: PrefillSection, *, num_groups: int, num_blocks: int, max_prompt_tokens: int, max_ttft_s: float | None = None
    ) -> Limits:
        """The limits of a replica whose longest prompt has max_prompt_tokens."""
        return cls(
            max_wave_tokens=section.max_wave_tokens,
            max_wave_prompts=section.max_wave_prompts,
            num_groups=num_groups,
            num_blocks=num_blocks,
            grant_timeout_s=section.grant_timeout_s,
            max_live_tokens=max(max_prompt_tokens, section.max_wave_tokens) + 2 * section.max_wave_tokens,
            mode=section.mode,
            chunk_tokens=section.chunk_tokens,
            long_chunk_tokens=section.long_chunk_tokens,
            piece_target_s=section.piece_target_s,
            ttft_floor_s=section.ttft_floor_s,
            ttft_stretch=section.ttft_stretch,
            max_ttft_s=max_ttft_s,
        )

    @property
    def company_tokens(self) -> int:
        """How many tokens prompts of one wave may have together; one alone may have more."""
        return self.chunk_tokens if self.mode == "chunked" else self.max_wave_tokens

    def chunk_tokens_of(self, num_tokens: int) -> int | None:
        """Rows of each chunk of a wave of so many tokens; None: it is one chunk."""
        chunk_tokens = self.chunk_tokens if self.mode == "chunked" else self.long_chunk_tokens
        return chunk_tokens if num_tokens > max(self.company_tokens, chunk_tokens) else None

    def num_chunks_of(self, num_tokens: int) -> int:
        chunk_tokens = self.chunk_tokens_of(num_tokens)
        return 1 if chunk_tokens is None else -(-num_tokens // chunk_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveView:
    """A live wave: its grid of groups and chunks, and where it stands.

    num_prompts: how many wait for it. next_group, next_chunk: the first cell that has neither run nor is running. num_passes: pieces of
    others since its own last one. target_s: when the first of its first tokens is due.
    """

    wave_id: int
    num_tokens: int
    num_groups: int
    target_s: float
    num_prompts: int = 1
    num_chunks: int = 1
    next_group: int = 0
    next_chunk: int = 0
    num_passes: int = 0

    @property
    def has_more(self) -> bool:
        return self.next_group < self.num_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything the policy may know.

    is_running: a piece is in the step thread now, so none may start. is_decoding: decode steps run in the same thread and wait for pieces.
    """

    prompts: tuple[PromptView, ...]
    waves: tuple[WaveView, ...]
    num_free_blocks: int
    is_running: bool
    limits: Limits
    costs: CostCurve
    is_decoding: bool = False
