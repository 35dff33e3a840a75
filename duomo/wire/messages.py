"""Every message between processes, on one page; values.py has what they are made of. Knows nothing of sockets (connection.py) or services.

WIRE_VERSION history:
    1 to 3  gone, and with them PrefillDone.expert_counts
    4  Sampling.{constraint, logit_bias}, RingOffered.{memory, device_idx, kv_dtype}
    5  Sampling.prompt_logprobs, PromptScored, ReplicaReport.{num_work_tokens, num_promised_blocks, tokens_per_s, step_s,
       max_choices}, Drain.ends, Undrain, FlushCaches, CachesFlushed

Versions N and N-1 are spoken. Fields newer than version N-1 are listed in SINCE and carry a default: the codec leaves them
out for an older peer; of Sampling only those that ask for nothing. Unknown types and unknown fields are refused (WireError). Times are
seconds; no clock of another machine is ever read: `remaining_s` counts down from the sender's now.

Who sends what:
    everyone        Hello, Heartbeat, Refused
    gateway -> P    StartPrefill, Cancel                gateway -> D    StartDecode, Resume, Cancel
    P -> D          WaveAnnounced, PrefillDone, TransferFenced, Cancel
    D -> P          RingOffered, HandleOffered, GroupLanded, PullKv, RequestFailed, Cancel
    P -> gateway    PromptScored
    P, D -> gateway TokensEmitted, Preempted, RequestFinished, RequestFailed, ReplicaReport, CachesFlushed
    gateway -> P, D at an operator's word: Drain, Undrain, FlushCaches
"""

from __future__ import annotations

from typing import Literal

import msgspec

from duomo.wire.values import EmittedToken, ExpertHistogram, Handle, PeerAddress, PromptLogprobs, Sampling, Timings

WIRE_VERSION = 5
MIN_WIRE_VERSION = 4

Role = Literal["gateway", "prefill", "decode", "directory"]

SINCE: dict[tuple[str, str], int] = {
    ("Sampling", "prompt_logprobs"): 5,
    ("ReplicaReport", "num_work_tokens"): 5,
    ("ReplicaReport", "num_promised_blocks"): 5,
    ("ReplicaReport", "tokens_per_s"): 5,
    ("ReplicaReport", "step_s"): 5,
    ("ReplicaReport", "max_choices"): 5,
    ("Drain", "ends"): 5,
}


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True, tag_field="type"):
    """A message: a MessagePack map with its class name under `type`."""


class _RequestMessage(_Message, frozen=True, kw_only=True):
    """A message about one attempt of one request.

    attempt: counts up from 0 for each retry or resume of a request; a lower attempt is void.
    traceparent: W3C trace context, "" when the request is not traced.
    remaining_s: seconds left until the request's deadline.
    """

    request_id: str
    attempt: int
    traceparent: str
    remaining_s: float


class Hello(_Message, frozen=True, kw_only=True):
    """First message both ways. mac = HMAC-SHA256 over the other side's nonce and these fields (see connection.py)."""

    min_version: int
    max_version: int
    boot_id: str
    replica_id: str
    role: Role
    model_fingerprint: str
    address: str
    nonce: bytes
    mac: bytes


class Refused(_Message, frozen=True, kw_only=True):
    """A typed refusal of a message or of the whole connection."""

    code: str
    detail: str


class Heartbeat(_Message, frozen=True, kw_only=True):
    """Sent both ways, answered at once with is_reply and the same seq: rtt and liveness of the socket."""

    seq: int
    is_reply: bool = False


class StartPrefill(_RequestMessage, frozen=True, kw_only=True):
    """Compute prompt_ids + emitted_ids, push their KV to `decode`, stream the next token of every choice to the gateway.

    choices: the choice numbers that this leg serves; emitted_ids is only set on a resume, which serves one choice.
    cache_salt salts the prefix hash (one API key cannot probe another's prompts).
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    choices: tuple[int, ...]
    decode: PeerAddress
    emitted_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0


class StartDecode(_RequestMessage, frozen=True, kw_only=True):
    """Expect this prompt's KV from `prefill`, then generate every choice."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    choices: tuple[int, ...]
    prefill: PeerAddress
    cache_salt: str = ""
    priority: int = 0


class Resume(_RequestMessage, frozen=True, kw_only=True):
    """StartDecode for one choice that has already emitted tokens (after a preemption or a lost leg)."""

    prompt_ids: tuple[int, ...]
    emitted_ids: tuple[int, ...]
    sampling: Sampling
    choice: int
    prefill: PeerAddress
    cache_salt: str = ""
    priority: int = 0


class RingOffered(_Message, frozen=True, kw_only=True):
    """D's landing ring for this peer: num_slots slots of slot_bytes from base_address, in the memory of NIXL agent ring_name.

    memory, device_idx: whose memory it is, as D's process counts its devices. kv_dtype: D's kv_transfer.kv_dtype.
    """

    ring_name: str
    agent_metadata: bytes
    base_address: int
    slot_bytes: int
    num_slots: int
    memory: Literal["host", "cuda"] = "host"
    device_idx: int = 0
    kv_dtype: Literal["model", "fp8_e4m3"] = "model"


class WaveAnnounced(_RequestMessage, frozen=True, kw_only=True):
    """P is about to prefill this prompt. group_bounds: layers [b[g], b[g+1]) form group g."""

    wave_id: int
    num_tokens: int
    group_bounds: tuple[int, ...]


class HandleOffered(_RequestMessage, frozen=True, kw_only=True):
    """D's grant for an announced prompt."""

    handle: Handle


class GroupLanded(_RequestMessage, frozen=True, kw_only=True):
    """D verified and scattered message `message_idx` of group `group`: its slot is a credit again."""

    handle_id: int
    group: int
    message_idx: int


class PrefillDone(_RequestMessage, frozen=True, kw_only=True):
    """The prompt is computed and every group pushed or being pushed; num_messages is the handle's total.

    first_token_ids: one for each choice, in the order of StartPrefill.choices (the sampling state is counter-based, so position and seed
    are all of it). ended_choices ended on P. expert_histogram: routed tokens of the prompt, less the cached ones.
    """

    handle_id: int
    num_messages: int
    first_token_ids: tuple[int, ...]
    ended_choices: tuple[int, ...]
    cached_tokens: int
    expert_histogram: ExpertHistogram | None = None


class TransferFenced(_RequestMessage, frozen=True, kw_only=True):
    """No write of this handle is or will be in flight: quarantined slots may be used again."""

    handle_id: int


class PullKv(_RequestMessage, frozen=True, kw_only=True):
    """D asks P to write a message again (it landed corrupt) while P still leases the blocks."""

    handle_id: int
    group: int
    message_idx: int


class PromptScored(_RequestMessage, frozen=True, kw_only=True):
    """Log-probabilities of the prompt's next tokens, for who asked (Sampling.prompt_logprobs): in order, all before a first token."""

    scores: PromptLogprobs


class TokensEmitted(_Message, frozen=True, kw_only=True):
    """All tokens of one engine step for one gateway."""

    tokens: tuple[EmittedToken, ...]


class Preempted(_RequestMessage, frozen=True, kw_only=True):
    """D gave up this choice's blocks after num_emitted tokens; the gateway resumes it."""

    choice: int
    num_emitted: int
    reason: str


class RequestFinished(_RequestMessage, frozen=True, kw_only=True):
    """All choices of this leg have ended here and everything it held is free. cached_tokens counts prompt tokens not computed."""

    cached_tokens: int
    timings: Timings


class RequestFailed(_RequestMessage, frozen=True, kw_only=True):
    """This leg is over and everything it held is free. code, phase, retryable, detail: see duomo.errors."""

    code: str
    phase: str
    retryable: bool
    detail: str


class Cancel(_RequestMessage, frozen=True, kw_only=True):
    """Stop this attempt and all earlier ones; choice None means every choice. Answered by nothing."""

    reason: str
    choice: int | None = None


class Drain(_Message, frozen=True, kw_only=True):
    """Take no new request and finish the live ones: to end within deadline_s or, where it does not end, to wait for an Undrain."""

    deadline_s: float
    ends: bool = True


class Undrain(_Message, frozen=True, kw_only=True):
    """Take new requests again. Refused (ending) by a replica whose drain leads to its end."""


class FlushCaches(_Message, frozen=True, kw_only=True):
    """Forget every prefix: nothing computed so far is found again, though what is in use stays in use. flush_id: the asker's own number."""

    flush_id: int


class CachesFlushed(_Message, frozen=True, kw_only=True):
    """The answer to FlushCaches. num_blocks: those whose prefix was forgotten, in use or not."""

    flush_id: int
    num_blocks: int


class ReplicaReport(_Message, frozen=True, kw_only=True):
    """Ten a second: what the router's policy and the invariants read. transport: what moves KV here, "nixl/UCX" or "loopback".

    experts: tokens that this replica routed since its start, in a report every few seconds; None in the others.
    num_work_tokens, of prefill: prompt tokens yet to be computed, in waves or waiting, less what its prefix cache has of them.
    num_promised_blocks, of decode: blocks that live legs have been promised or wait for, and have not taken. Both None from the other role.
    tokens_per_s, of prefill: prompt tokens computed in a second, in full waves. step_s: what a decode step, or
    prefill's smallest wave, takes. Both 0 while not known. max_choices, of decode: how many should run at once for decode.max_itl_s to be
    kept; None where none is set.
    """

    replica_id: str
    boot_id: str
    role: Role
    is_draining: bool
    num_running: int
    num_queued: int
    num_queued_tokens: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_slots: int
    num_free_slots: int
    num_quarantined_slots: int
    num_open_handles: int
    num_open_spans: int
    num_steps: int
    block_tokens: int
    prefix_digests: tuple[int, ...] = ()
    counters: dict[str, int] = {}
    progress_age_s: float = 0.0
    pid: int = 0
    transport: str = ""
    experts: ExpertHistogram | None = None
    num_work_tokens: int | None = None
    num_promised_blocks: int | None = None
    tokens_per_s: float = 0.0
    step_s: float = 0.0
    max_choices: int | None = None


RequestMessage = (
    StartPrefill
    | StartDecode
    | Resume
    | WaveAnnounced
    | HandleOffered
    | GroupLanded
    | PrefillDone
    | TransferFenced
    | PullKv
    | PromptScored
    | Preempted
    | RequestFinished
    | RequestFailed
    | Cancel
)
OperatorMessage = Drain | Undrain | FlushCaches | CachesFlushed
Message = RequestMessage | Hello | Refused | Heartbeat | RingOffered | TokensEmitted | ReplicaReport | OperatorMessage
