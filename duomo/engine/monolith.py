"""Owns the engine in one loop: prefill and decode, continuous batching, no split: what the pools are compared with. Knows no service."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.blocks import BlockManager, prefix_hashes
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.runner import ModelRunner
from duomo.engine.sampler import RowSampling, SampledToken, Sampler, broken_rows, ending_ids
from duomo.grammar.state import Grammar, GrammarState
from duomo.models.qwen3_moe import Model
from duomo.wire.values import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One choice of one prompt. cache_salt keeps prefixes of different owners apart. grammar: sampling's constraint, compiled."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    choice: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MonolithLimits:
    """Sizes of the loop. num_blocks None: enough for every request at once."""

    num_blocks: int | None = None
    block_tokens: int = 16
    max_batch: int = 64
    max_step_tokens: int = 2048
    prefix_cache_blocks: int = 0


@dataclass(slots=True)
class _Sequence:
    place: int
    request: GenerateRequest
    ends: tuple[int, ...]
    table: list[int]
    num_in_kv: int
    grammar: GrammarState | None
    output: list[SampledToken] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)

    def slice(self, max_tokens: int) -> PromptSlice:
        known = self.output_ids[-1:] if self.output_ids else self.request.prompt_ids
        first = 0 if self.output_ids else self.num_in_kv
        return PromptSlice(token_ids=known[first : first + max_tokens], start=self.num_in_kv, block_table=self.table)

    @property
    def is_over(self) -> bool:
        return len(self.output) >= self.request.sampling.max_tokens or (bool(self.output_ids) and self.output_ids[-1] in self.ends)


class Monolith:
    """Runs requests to their end. Blocks for prompt and max_tokens are taken at admission, so nothing is ever preempted."""

    def __init__(self, model: Model, limits: MonolithLimits, num_blocks: int) -> None:
        self._model = model
        self._limits = limits
        self._cache = KvCache(kv_spec(model.config, limits.block_tokens), num_blocks)
        self._runner = ModelRunner(model, self._cache)
        self._sampler = Sampler()
        self.blocks = BlockManager(num_blocks, limits.block_tokens, max_cached_blocks=limits.prefix_cache_blocks)
        self._waiting: deque[tuple[int, GenerateRequest]] = deque()
        self._running: list[_Sequence] = []

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[SampledToken]]:
        """Each request's tokens (an ending token included), in the order of the requests."""
        outputs: list[list[SampledToken]] = [[] for _ in requests]
        self._waiting.extend(enumerate(requests))
        while self._waiting or self._running:
            self._admit()
            assert self._running, "a request that fits no empty pool"
            for done in self._step():
                outputs[done.place] = done.output
        return outputs

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._limits.max_batch:
            place, request = self._waiting[0]
            hashes = prefix_hashes(request.prompt_ids[:-1], self._limits.block_tokens, request.cache_salt)
            table = self.blocks.lookup(hashes)
            rest = self.blocks.allocate(self.blocks.num_blocks_for(_max_tokens(request)) - len(table))
            if rest is None:
                self.blocks.free(table)
                return
            self._waiting.popleft()
            ends = ending_ids(request.sampling, self._model.config.eos_ids)
            grammar = request.grammar.state(request.sampling) if request.grammar is not None else None
            self._running.append(_Sequence(place, request, ends, table + rest, len(table) * self._limits.block_tokens, grammar))

    def _step(self) -> list[_Sequence]:
        room, stepping, slices = self._limits.max_step_tokens, [], []
        for sequence in self._running:
            if room > 0:
                part = sequence.slice(room)
                stepping.append(sequence)
                slices.append(part)
                room -= len(part.token_ids)
        batch = StepBatch(slices=tuple(slices))
        state = self._runner.run_layers(0, self._model.config.num_layers, self._runner.begin(batch))
        for sequence, part in zip(stepping, slices, strict=True):
            sequence.num_in_kv = part.end
        ready = [
            (sequence, row)
            for sequence, row in zip(stepping, batch.last_rows, strict=True)
            if sequence.num_in_kv == len(sequence.request.prompt_ids) + len(sequence.output_ids)
        ]
        rows = [
            RowSampling(
                sampling=sequence.request.sampling,
                choice=sequence.request.choice,
                prompt_ids=sequence.request.prompt_ids,
                output_ids=sequence.output_ids,
                ending_ids=sequence.ends,
                grammar=sequence.grammar,
            )
            for sequence, _ in ready
        ]
        sampled = self._sampler.sample(self._runner.logits(state, [row for _, row in ready]), rows)
        for error in broken_rows(rows).values():
            raise error
        for (sequence, _), token in zip(ready, sampled, strict=True):
            sequence.output.append(token)
            sequence.output_ids.append(token.token_id)
        return self._retire()

    def _retire(self) -> list[_Sequence]:
        done = [sequence for sequence in self._running if sequence.is_over]
        for sequence in done:
            prompt = sequence.request.prompt_ids
            self.blocks.commit(sequence.table, prefix_hashes(prompt, self._limits.block_tokens, sequence.request.cache_salt))
            self.blocks.free(sequence.table)
        self._running = [sequence for sequence in self._running if not sequence.is_over]
        return done


def _max_tokens(request: GenerateRequest) -> int:
    return len(request.prompt_ids) + request.sampling.max_tokens


def generate(model: Model, requests: Sequence[GenerateRequest], limits: MonolithLimits | None = None) -> list[list[SampledToken]]:
    """Tokens of every request, by one continuously batched loop over one pool."""
    limits = limits or MonolithLimits()
    num_blocks = limits.num_blocks or sum(-(-_max_tokens(request) // limits.block_tokens) for request in requests) + 1
    return Monolith(model, limits, num_blocks).generate(requests)
