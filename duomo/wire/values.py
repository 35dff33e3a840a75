"""The values inside messages: what is sampled and how, who may write where, what a token came with. Knows no message (messages.py)."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value inside a message."""


class PeerAddress(_Value, frozen=True, kw_only=True):
    """Where a replica listens: `unix:/path` or `tcp:host:port`."""

    replica_id: str
    boot_id: str
    address: str


class Constraint(_Value, frozen=True, kw_only=True):
    """What every answer must be. text: a JSON schema; a regular expression; a JSON array of strings; a grammar in Lark or GBNF.

    Whoever samples compiles it, and finds its place in it by the choice's tokens alone: nothing else of it travels.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str


class Sampling(_Value, frozen=True, kw_only=True):
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 and min_p 0 are off.

    seed: 64-bit counter-based seed; the gateway always sets it. logprobs: None, or how many top alternatives (0 = only the chosen).
    stop_token_ids end a choice with "stop" (the token itself is emitted); eos ids count unless ignore_eos. logit_bias: (id, what is added
    to it). Under a constraint eos ids always end a choice: they come where the grammar may; with ignore_eos, or before min_tokens, last.
    prompt_logprobs: None, or how many top alternatives of each prompt token (0 = only its own); the prefix cache is not read then.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None


class Handle(_Value, frozen=True, kw_only=True):
    """D's grant for one prompt: where its KV may land, and for whom. Fenced by both boot ids.

    slots: landing slots; message m of the handle goes to slots[m % len(slots)], and may be written only after message
    m - len(slots) was released by GroupLanded. first_block..num_blocks are the blocks to send (earlier ones D has).
    """

    handle_id: int
    producer_boot_id: str
    consumer_boot_id: str
    model_fingerprint: str
    request_id: str
    attempt: int
    ring_name: str
    slots: tuple[int, ...]
    num_tokens: int
    num_blocks: int
    first_block: int = 0


class ExpertHistogram(_Value, frozen=True, kw_only=True):
    """Tokens routed to each expert: num_layers x num_experts little-endian integers of int_bytes each, layer by layer.

    Read and written by duomo/wire/histogram.py, as one array: a list of thousands of numbers costs a request milliseconds.
    """

    num_layers: int
    num_experts: int
    counts: bytes
    int_bytes: Literal[4, 8] = 4


class TokenLogprob(_Value, frozen=True, kw_only=True):
    """Natural-log probability of the chosen token and of the most likely ones (id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptLogprobs(_Value, frozen=True, kw_only=True):
    """Natural-log probabilities of prompt tokens [first, first + num_tokens), each given all before it, and of the likeliest in its place.

    Little-endian, token by token: logprobs num_tokens x (1 + num_top) floats of float_bytes, its own and then the likeliest, best first;
    top_ids num_tokens x num_top int32; ranks num_tokens int32, 1 for the likeliest. Read and written by duomo/wire/prompt_logprobs.py.
    """

    first: int
    num_tokens: int
    num_top: int
    logprobs: bytes
    top_ids: bytes
    ranks: bytes
    float_bytes: Literal[4, 8] = 8


class Timings(_Value, frozen=True, kw_only=True):
    """Parts of one leg, measured by the process that did the work, on its own monotonic clock, in seconds.

    total_s spans from the frame that started the leg read off the socket to the frame that carries this written to it.
    P: queue_s (until the first group runs), compute_s (first group to logits), sample_s. D: handoff_exposed_s (PrefillDone seen until
    the last message landed and verified), admit_s (until the step that takes it in starts), first_step_s, peer_rtt_s (D's round trip to P).
    """

    total_s: float
    queue_s: float = 0.0
    compute_s: float = 0.0
    sample_s: float = 0.0
    handoff_exposed_s: float = 0.0
    admit_s: float = 0.0
    first_step_s: float = 0.0
    peer_rtt_s: float = 0.0


class EmittedToken(_Value, frozen=True, kw_only=True, gc=False):
    """Token `index` (0-based, over all attempts) of one choice. timings come with a leg's first token.

    gc=False: it holds nothing that could hold it, and a gateway makes tens of thousands a second.
    """

    request_id: str
    choice: int
    attempt: int
    index: int
    token_id: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
