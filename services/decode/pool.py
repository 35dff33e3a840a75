"""Owns the pool's blocks together with what has been promised of them and what they are remembered for. Knows legs, no socket, no tensor.

Blocks are taken here (for a leg that is granted, a table that grows, a fork) and come back here on every path that ends a leg.

Following turns find what an earlier one left: a prompt is remembered once all of it has arrived and was verified, an answer when its choice
ends, up to the last token that was fed (the token sampled last has no KV). What was found at a grant is held from then on. A prompt whose
beginning nobody has finished yet shares nothing: two that are granted together both land whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from duomo.engine.blocks import BlockManager, PromptTable, allocate_prompt, prefix_hashes
from services.decode.leg import Choice, Leg, LegState
from services.decode.policy import DecodeLimits, PoolView
from services.kv_transfer.loans import BlockLoans


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTerms:
    """max_blocks: as BlockManager's, for a pool of decode's own. keeps_answers: whether generated tokens are remembered beside prompts."""

    max_blocks: int | None = None
    keeps_answers: bool = True


class Pool:
    """The block manager and the legs that hold its blocks. loans: the pool is shared with the prefill service of this process."""

    def __init__(self, limits: DecodeLimits, loans: BlockLoans | None = None, cache: CacheTerms | None = None) -> None:
        self.limits = limits
        self._cache = cache or CacheTerms()
        self._loans = loans
        own = self._cache.max_blocks
        self.manager = BlockManager(limits.num_blocks, limits.block_tokens, max_cached_blocks=own) if loans is None else loans.manager
        self.holders: dict[int, Leg] = {}
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> dict[str, int]:
        """For the report: docs/metrics.md."""
        return {**self._counters, "prefix_blocks_evicted": self.manager.num_evicted}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had now: free ones and cached ones that nobody reads."""
        return self.manager.num_available

    def open_promise_blocks(self) -> int:
        return sum(leg.open_promise() for leg in self.holders.values())

    def unpromised_blocks(self) -> int:
        return self.num_free_blocks - self.open_promise_blocks()

    def view(self) -> PoolView:
        """The pool as the grant policy sees it."""
        legs = self.holders.values()
        return PoolView(
            num_free_blocks=self.num_free_blocks,
            open_promise_blocks=self.open_promise_blocks(),
            num_live_legs=len(legs),
            num_live_choices=sum(len(leg.choices) if leg.state is LegState.RUNNING else len(leg.choice_numbers) for leg in legs),
        )

    def take(self, num_blocks: int) -> list[int]:
        """Blocks that the policy has said are there."""
        blocks = self.manager.allocate(num_blocks)
        assert blocks is not None, f"the policy promised {num_blocks} blocks, {self.num_free_blocks} are free"
        return blocks

    def take_prompt(self, token_ids: Sequence[int], salt: str, *, is_scored: bool = False) -> PromptTable:
        """The table of a prompt that the policy has granted, what is known of it first; of one whose own log-probabilities were asked for
        nothing is, where prefill computes into these blocks."""
        reads_cache = not is_scored or self._loans is None
        table = allocate_prompt(self.manager, token_ids, salt, reads_cache=reads_cache)
        assert table is not None, f"the policy granted {len(token_ids)} tokens, {self.num_free_blocks} blocks are free"
        self._counters["granted_tokens_cached"] += table.cached_tokens
        self._counters["granted_tokens_missing"] += len(token_ids) - table.cached_tokens
        return table

    def arrived(self, leg: Leg) -> None:
        """The KV of the whole prompt is in leg.blocks: from now on others find it. Told once or twice, it is remembered once."""
        if not leg.is_remembered:
            leg.is_remembered = True
            self.manager.commit(leg.blocks, leg.prefix_hashes)

    def fork(self, table: list[int], num_tokens: int) -> tuple[list[int], tuple[int, int] | None]:
        """The table of a second sequence over the same num_tokens, and the block copy (from, to) that it needs before it is written.

        Full blocks are shared; a last partial one is copied, since both will write it.
        """
        fork = self.manager.fork(table)
        copies: list[tuple[int, int]] = []
        if num_tokens % self.limits.block_tokens:
            was_there = self.manager.writable(fork, num_tokens // self.limits.block_tokens, lambda src, dst: copies.append((src, dst)))
            assert was_there, "a fork's blocks are part of its leg's promise"
        return fork, copies[0] if copies else None

    def ended(self, choice: Choice) -> None:
        """Its blocks come back; the tokens that were fed stay known, unless the leg is distrusted.

        A turn that is queued for the choice (batch.py) writes behind the tokens counted here, into a block that nobody is told of.
        """
        leg = choice.leg
        if self.manager.has_prefix_cache and self._cache.keeps_answers and not leg.is_distrusted:
            fed_ids = (*leg.prompt_ids, *choice.output_ids)[: choice.num_kv]
            hashes = prefix_hashes(fed_ids, self.limits.block_tokens, leg.cache_salt, leg.prefix_hashes)
            self.manager.commit(choice.table, hashes)
        self.give_back(choice.table)

    def distrust(self, leg: Leg) -> None:
        """What this running leg computed is wrong, or was computed from what is: nobody finds its blocks any more."""
        leg.is_distrusted = True
        for choice in leg.choices.values():
            self.manager.forget(choice.table)

    def give_back(self, blocks: Iterable[int]) -> None:
        """Drop one reader of each block."""
        self.manager.free(list(blocks))

    def check_integrity(self) -> None:
        """Raise AssertionError where a block is lost, or held by nobody."""
        self.manager.check_integrity()
        self.check_at_rest()

    def check_at_rest(self) -> None:
        """The same, but cheap whatever the pool's size: for whenever it is idle."""
        self.manager.check_at_rest()
        if not self.holders and (self._loans is None or not self._loans.num_taken_blocks):
            assert self.num_free_blocks == self.limits.num_blocks, (
                f"{self.limits.num_blocks - self.num_free_blocks} of {self.limits.num_blocks} blocks are held by nobody"
            )
