"""Every message that crosses a process border.

A message is a frozen struct; `shared/wire.py` turns it into bytes. Tensors travel as raw frames beside the header and
are described by `TensorSpec`. Ids and counts are plain integers; durations are seconds measured in one process.
"""

from __future__ import annotations

from typing import Literal, NewType

from msgspec import Struct, field

RequestId = NewType("RequestId", str)

PROTOCOL_VERSION = 1

Role = Literal["frontend", "target", "drafter", "image"]
WorkerState = Literal["absent", "loading", "ready"]
FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["last", "mean"]  # of a prompt's hidden rows: the last one, or their mean


class Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A struct that is part of a message."""


class Message(Struct, frozen=True, kw_only=True, tag=True, tag_field="type", forbid_unknown_fields=True):
    """A struct that is sent on its own."""


class TensorSpec(Part, frozen=True, kw_only=True):
    """Describes one raw frame: `dtype` is an MLX/NumPy name ("float32", "bfloat16", ...), row-major."""

    dtype: str
    shape: list[int]


# ---------------------------------------------------------------- every peer <-> scheduler


class PrefixCacheInfo(Part, frozen=True, kw_only=True):
    """What the target's prefix cache can hold, and what of a sequence it must hold to restore it."""

    block_size: int  # tokens
    num_blocks: int  # of the device pool
    block_bytes: int
    window: int = 0  # the longest sliding window: so many positions before a hit's end need their sliding rows
    ring_tokens: int = 0  # positions before a sequence's end whose sliding rows no draft overwrites; 0: no such layer
    is_recurrent: bool = False  # a hit needs the recurrent state at its end
    is_checkable: bool = True  # blocks hold keys and values that can be compared with a new computation
    num_states: int = 0
    state_bytes: int = 0
    is_shared: bool = False  # sequences refer to cached blocks, of every layer, in place of copying them
    num_archived: int = 0  # blocks that the archive holds: BlocksArchived right behind the Ready tell which


class Exactness(Part, frozen=True, kw_only=True):
    """How verifying differs from plain decoding on this machine, from a few greedy tokens decoded at start."""

    widths: list[int]  # tokens verified at once
    num_positions: int  # compared at each width
    max_logit_difference: float
    min_top_two_gap: float  # smallest distance between the two largest logits seen
    num_flipped: int  # positions whose most likely token was another one
    can_ties_flip: bool  # one flipped, or the smallest gap is within what two logits may differ by


class WorkerInfo(Part, frozen=True, kw_only=True):
    """What a ready worker tells about itself."""

    model: str  # the name users see
    architecture: str
    fingerprint: str  # weights + config + dtype; two equal fingerprints compute the same
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int  # prompt + output tokens of one sequence
    num_slots: int
    kv_capacity_tokens: int  # sum of the slot capacities that may be held at once
    capacity_classes: list[int]  # ascending slot capacities in tokens; the last one holds max_model_len
    kv_bytes_per_token: int
    max_step_tokens: int  # widest prefill chunk that the caches take in one step
    eos_token_ids: list[int]
    draft_kind: str | None = None  # drafter only
    max_draft_tokens: int = 0  # drafter: longest draft it can make; target: most drafts it verifies in one row
    step_costs: list[StepCost] = field(default_factory=list)  # measured at start; drafter: of k tokens, as `width`
    packs_rows: bool = False  # target only: a step costs by its tokens; otherwise rows are padded to the widest
    queues_steps: bool = False  # target only: one is made ready while another runs
    exactness: Exactness | None = None  # target only, with drafts: measured at start
    prefix_cache: PrefixCacheInfo | None = None  # target only; None: switched off
    modalities: list[MediaKind] = field(default_factory=list)  # what the model takes beside text
    whole_media: list[MediaKind] = field(default_factory=list)  # kinds of which one prefill chunk must hold all tokens
    load_id: int = 0  # of the choice of a model that it was started with (shared/served.py)
    attention: list[str] = field(default_factory=list)  # target only: which kernels attend, and why; empty: stock
    embedding_size: int = 0  # target only: numbers of a pooled hidden row; 0: its hidden rows cannot be seen
    adapters: dict[str, str] = field(default_factory=dict)  # target only: LoRA adapters' names -> fingerprints


class StepCost(Part, frozen=True, kw_only=True):
    """Seconds that a step of `batch` rows, each `width` tokens wide, keeps the device."""

    batch: int
    width: int
    seconds: float


class Hello(Message, frozen=True, kw_only=True):
    """Peer -> scheduler, first message and after every loss of contact. `instance_id` is new for each process start."""

    role: Role
    instance_id: str
    pid: int
    protocol_version: int = PROTOCOL_VERSION
    last_exit: int | None = None  # of the process before it, as its supervisor saw it; negative: a signal


class Welcome(Message, frozen=True, kw_only=True):
    """Scheduler -> peer. `scheduler_id` changes when the scheduler restarts; `epoch` when this role's worker
    changes."""

    scheduler_id: str
    epoch: int


class Ready(Message, frozen=True, kw_only=True):
    """Worker -> scheduler: the model is loaded and warm."""

    epoch: int
    info: WorkerInfo


class Heartbeat(Message, frozen=True, kw_only=True):
    """Both ways, every `heartbeat_interval_s`. An unknown `instance_id` is answered by asking for a new Hello."""

    instance_id: str
    memory_bytes: dict[str, int] = field(
        default_factory=dict
    )  # by kind, as `workers.machine.memory` has them, and "resident"
    num_dropped_messages: int = 0  # bad, truncated or stale messages seen by the sender
    num_feature_bytes: int = 0  # target: hidden rows sent to the drafter since it started
    epoch: int = 0  # worker: of the Welcome it has; 0: none, or it has just asked for a new one
    is_idle: bool = False  # worker: it is waiting for a message, and has nothing else to do


class SayHello(Message, frozen=True, kw_only=True):
    """Scheduler -> peer: I do not know you (any more); say hello again."""


# ---------------------------------------------------------------- frontend -> scheduler


class SamplingParams(Part, frozen=True, kw_only=True):
    """How one sequence's tokens are drawn. `seed` is always set (the frontend draws one), `is_seeded` if a client
    did."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0  # 0 .. 2**63-1
    is_seeded: bool = False
    num_logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely ones'


class Grammar(Part, frozen=True, kw_only=True):
    """What a sequence's answer has to match. `text` is a JSON Schema, a regular expression or Lark source."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""  # empty with json_object: any JSON object


class Thinking(Part, frozen=True, kw_only=True):
    """Where a sequence's reasoning begins and ends: a grammar applies to what comes after it.

    `start` is the text that opens reasoning; empty where the prompt has opened it already. `end` closes it.
    """

    start: str
    end: str
    start_token_ids: list[int] = field(default_factory=list)  # `start` as the model would write it
    end_token_ids: list[int]  # `end` likewise; written for the model when the budget is spent
    budget: int | None = None  # tokens between start and end; None: no limit


MediaKind = Literal["image", "video", "audio"]


class MediaTensor(Part, frozen=True, kw_only=True):
    """An array of an image, video or clip: row-major, little-endian. `dtype` as in TensorSpec."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


class MediaItem(Part, frozen=True, kw_only=True):
    """What stands at positions start .. start+num_tokens-1 of a prompt in place of the tokens there."""

    kind: MediaKind
    start: int
    num_tokens: int
    content_hash: bytes  # over tensors and grid: equal hashes encode to equal rows
    tensors: list[MediaTensor]  # which ones, the model's processor and encoder agree on
    grid: list[int] = field(default_factory=list)  # images, video: frames, rows, columns of patches
    seconds_per_grid: float = 1.0  # video: between two frames of `grid`


class Submit(Message, frozen=True, kw_only=True):
    """Start (or, with `output_token_ids`, resume) a request. Answered by Outputs or Rejected."""

    request_id: RequestId
    prompt_token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int  # output tokens, those of `output_token_ids` included
    output_token_ids: list[int] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)  # end the output and belong to it
    min_tokens: int = 0  # stop tokens do not end the output before this many
    grammar: Grammar | None = None
    thinking: Thinking | None = None  # only where a grammar waits for its end, or there is a budget
    priority: int = 0  # smaller runs first
    tenant: str = ""  # whose it is, for the prefix cache and fair sharing: a digest, never the API key
    cache_salt: str = ""  # cached prefixes are shared between requests of one tenant with one salt
    timeout_s: float | None = None
    is_resumed: bool = False  # it was accepted before: a new scheduler takes it even before a target is ready
    media: list[MediaItem] = field(default_factory=list)  # in the order of their places
    pooling: Pooling | None = None  # wanted is one vector for the prompt and no output; max_tokens is 1
    adapter: str = ""  # the LoRA adapter's name; empty: the base model


class Cancel(Message, frozen=True, kw_only=True):
    """The client went away, or a stop string ended the output; `reason` is counted."""

    request_id: RequestId
    reason: Literal["client_gone", "stop_string", "timeout", "shutdown"] = "client_gone"


class MetricsRequest(Message, frozen=True, kw_only=True):
    """Answered by MetricsPage with the same `query_id`."""

    query_id: int


class CacheRequest(Message, frozen=True, kw_only=True):
    """Answered by CacheReply with the same `query_id`."""

    query_id: int
    clear: bool = False  # drop every cached block first


# ---------------------------------------------------------------- scheduler -> frontend


class CacheReply(Message, frozen=True, kw_only=True):
    """State and counts of the prefix cache since the scheduler's start."""

    query_id: int
    enabled: bool
    block_size: int = 0
    blocks: dict[str, int] = field(default_factory=dict)  # tier -> blocks
    tier_bytes: dict[str, int] = field(default_factory=dict)
    capacity_blocks: int = 0  # of the device tier
    query_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    misses: dict[str, int] = field(default_factory=dict)  # reason -> lookups that got less than they might have
    checks: dict[str, int] = field(default_factory=dict)  # "equal", "different" -> blocks
    cleared_blocks: int = 0


class TopLogprob(Part, frozen=True, kw_only=True):
    token_id: int
    logprob: float


class TokenLogprob(Part, frozen=True, kw_only=True):
    """Log-probabilities at one output position, from the model's own distribution (before temperature and filters)."""

    logprob: float
    top: list[TopLogprob]


class Timings(Part, frozen=True, kw_only=True):
    """Seconds and counts of one request, stamped in the scheduler."""

    queue_s: float
    prefill_s: float
    decode_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0


class Verified(Part, frozen=True, kw_only=True):
    """What a draft gave to one Output: the first `num_accepted` of its tokens; the others are the target's own."""

    drafter: str  # its kind as metrics name it: "ngram", "suffix", "model", "eagle3", ...
    num_draft_tokens: int
    num_accepted: int  # more than the Output's tokens where a stop token ended the output inside the draft


class Output(Part, frozen=True, kw_only=True, gc=False):
    """New tokens of one request and, in its last one, how it ended."""

    request_id: RequestId
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids
    finish_reason: FinishReason | None = None  # set exactly once in a request's life
    error: str | None = None  # with finish_reason "error"
    timings: Timings | None = None  # with finish_reason
    start: int | None = None  # place of token_ids[0] in the output: a repeated or lost Outputs is noticed
    error_code: str | None = None  # one of shared.errors' codes, with `error`; None: the engine's failure
    verified: Verified | None = None  # None: a step without drafts
    is_repeated: bool = False  # sent again after a loss: which tokens were drafted is not known any more
    embedding: bytes | None = None  # (H,) float32, little-endian; with finish_reason "stop" of a Submit with `pooling`


class Outputs(Message, frozen=True, kw_only=True):
    """What one step gave to one frontend."""

    outputs: list[Output]


class Rejected(Message, frozen=True, kw_only=True):
    """The terminal answer to a Submit that was not accepted. `code` is one of shared.errors' codes."""

    request_id: RequestId
    code: str
    message: str
    retry_after_s: float | None = None


class EngineStatus(Message, frozen=True, kw_only=True):
    """Sent on every change and with every heartbeat; `/health` shows it."""

    scheduler_id: str
    target: WorkerState
    drafter: WorkerState
    target_info: WorkerInfo | None = None
    drafter_info: WorkerInfo | None = None
    num_running: int = 0
    num_waiting: int = 0


class MetricsPage(Message, frozen=True, kw_only=True):
    query_id: int
    page: bytes  # Prometheus text format


# ---------------------------------------------------------------- scheduler <-> target


class SequenceStart(Part, frozen=True, kw_only=True):
    """Binds a slot to a sequence; comes with the sequence's first row in this epoch.

    `token_ids` are all tokens known now (prompt, and output when the sequence resumes): penalties need them.
    `restore` are blocks of the prefix cache that hold positions 0 .. len(restore)*block_size-1: the first row goes on
    behind them.
    """

    slot: int
    request_id: RequestId
    sampling: SamplingParams
    num_prompt_tokens: int
    token_ids: list[int]
    grammar: Grammar | None = None
    thinking: Thinking | None = None
    capacity: int = 0  # that of the first row
    restore: list[int] = field(default_factory=list)
    restore_state: int | None = None  # recurrent models: the state behind the last of these blocks
    media: list[MediaItem] = field(default_factory=list)
    pooling: Pooling | None = None
    adapter: str = ""  # one of WorkerInfo.adapters; empty: the base model


class DraftDistribution(Part, frozen=True, kw_only=True):
    """What a sequence's k drafts were drawn from: for each a row of tokens with their chances; other tokens had none.

    Both arrays are (k, width), row-major, little-endian. Entries with probability 0 fill short rows.
    """

    width: int
    token_ids: bytes  # int32
    probabilities: bytes  # float32; each row sums to 1


class StepRow(Part, frozen=True, kw_only=True, gc=False):
    """One sequence's share of a step: input tokens at positions start .. start+n-1.

    `token_ids` None means one token: the last one sampled in this slot, still on the device (pipelined decode).
    With `num_drafts` k > 0 the last k of token_ids are drafts to verify. `is_sampled` False: a prefill chunk that is
    not the last one, whose logits nobody needs.
    """

    slot: int
    start: int
    capacity: int  # tokens the slot must hold after this step; grows over a sequence's life
    token_ids: list[int] | None = None
    num_drafts: int = 0
    is_sampled: bool = True
    draft_distribution: DraftDistribution | None = None  # None: drafts that are a function of the text
    keep_state: int | None = None  # keep the slot's recurrent state after this row under this id


class EncodeRow(Part, frozen=True, kw_only=True):
    """Run the encoder on one of a slot's media, before the prefill chunk that needs it."""

    slot: int
    index: int  # in the `media` of the slot's SequenceStart


class BlockStore(Part, frozen=True, kw_only=True):
    """Copy blocks of a slot into the prefix cache's pool (or, as a check, compare them with it)."""

    slot: int
    indices: list[int]  # indices[i] is the block of positions indices[i]*block_size ..
    block_ids: list[int]  # where it goes
    hashes: list[bytes]
    has_window: list[bool]  # its rows of sliding layers are intact
    states: dict[int, int] = field(default_factory=dict)  # position in `indices` -> id of the state behind that block


class Step(Message, frozen=True, kw_only=True):
    """One scheduler iteration. Decode rows run as one batch, each prefill row as a forward of its own.

    `step_id` counts from 1 in each epoch: a target that sees a gap says hello again.
    """

    epoch: int
    step_id: int
    starts: list[SequenceStart]
    decodes: list[StepRow]
    prefills: list[StepRow]
    after_release: int = 0  # id of the last Release sent before it
    stores: list[BlockStore] = field(default_factory=list)  # after the rows
    checks: list[BlockStore] = field(default_factory=list)  # after the stores
    encodes: list[EncodeRow] = field(default_factory=list)
    holds_features: bool = False  # the drafter gets the rows' features with the next step that does not hold them


class Shrink(Part, frozen=True, kw_only=True):
    """Memory is short: give back what no sequence needs. The device pool's other blocks were forgotten."""

    kept_blocks: list[int]  # ids
    free_states: list[int]  # ids of kept recurrent states that nobody has


class Release(Message, frozen=True, kw_only=True):
    """These slots are free, once their `stores` are made; steps sent before still use them."""

    epoch: int
    slots: list[int]
    release_id: int = 0  # counts from 1 in each epoch
    after_step: int = 0  # id of the last Step sent before it
    stores: list[BlockStore] = field(default_factory=list)
    shrink: Shrink | None = None  # done last


class LoadBlocks(Message, frozen=True, kw_only=True):
    """Fetch blocks from the archive (host memory, SSD) into the device pool. Answered by BlocksLoaded."""

    epoch: int
    load_id: int  # counts from 1 in each epoch
    hashes: list[bytes]
    block_ids: list[int]
    after_step: int = 0  # id of the last Step sent before it: that may still read what lies there
    states: dict[int, int] = field(default_factory=dict)  # position in `hashes` -> state id


class BlocksLoaded(Message, frozen=True, kw_only=True):
    """`is_loaded[i]` tells whether the i-th block of the LoadBlocks, with all that was asked of it, is in its place."""

    epoch: int
    load_id: int
    is_loaded: list[bool]


class ArchivedBlock(Part, frozen=True, kw_only=True):
    block_hash: bytes
    has_window: bool
    has_state: bool


class BlocksArchived(Message, frozen=True, kw_only=True):
    """Target -> scheduler: blocks that the archive holds from now on, and blocks that it dropped."""

    epoch: int
    added: list[ArchivedBlock] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    blocks: dict[str, int] = field(default_factory=dict)  # "host", "ssd" -> blocks held
    tier_bytes: dict[str, int] = field(default_factory=dict)
    num_errors: int = 0  # files that could not be written or read since the last message


class ClearArchive(Message, frozen=True, kw_only=True):
    """Scheduler -> target: drop every archived block."""

    epoch: int


class RowResult(Part, frozen=True, kw_only=True, gc=False):
    """Tokens of one sampled row: accepted drafts, then the bonus token or correction. Empty with `error` and where the
    sequence is pooled: then `embedding` is its vector."""

    slot: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None  # this row failed alone
    embedding: bytes | None = None  # (H,) float32, little-endian


class StepResult(Message, frozen=True, kw_only=True):
    """Answer to a Step, in order. `phases` are seconds: "build", "device", "read"."""

    epoch: int
    step_id: int
    rows: list[RowResult]  # sampled rows only
    phases: dict[str, float]
    differing: list[bytes] = field(default_factory=list)  # hashes of checked blocks that differ from what is cached


class WorkerFailed(Message, frozen=True, kw_only=True):
    """A worker cannot go on (out of memory, bad model); it exits after sending this."""

    epoch: int
    reason: str


class Drain(Message, frozen=True, kw_only=True):
    """Scheduler -> peer: finish what is queued and stop."""


# ---------------------------------------------------------------- scheduler <-> drafter


class DraftRow(Part, frozen=True, kw_only=True):
    """Ask for up to `num_tokens` drafts after the committed tokens; 0: they are to be taken in, for later ones.

    `token_ids` are committed ids that the drafter lacks, at positions start .. start+n-1; the last one is the anchor.
    """

    request_id: RequestId
    start: int
    token_ids: list[int]
    num_tokens: int
    sampling: SamplingParams | None = None  # None: the most likely tokens; else drawn, with their distribution
    media: list[MediaItem] = field(default_factory=list)  # of the prompt, with `start` 0; without their tensors


class DraftRequest(Message, frozen=True, kw_only=True):
    epoch: int
    draft_id: int
    rows: list[DraftRow]
    target_epoch: int  # whose features count from now on
    ended: list[RequestId] = field(default_factory=list)  # sequences whose state may be dropped


class Draft(Part, frozen=True, kw_only=True):
    request_id: RequestId
    anchor: int  # position of the anchor the drafts follow
    token_ids: list[int]
    distribution: DraftDistribution | None = None  # where the tokens were drawn; one row for each


class DraftReply(Message, frozen=True, kw_only=True):
    """Answer to a DraftRequest; `draft_id` echoes it. A row that could not be drafted has no tokens."""

    epoch: int
    draft_id: int
    drafts: list[Draft]
    seconds: float


# ---------------------------------------------------------------- target -> drafter


class FeatureRows(Part, frozen=True, kw_only=True):
    """Rows of one sequence at positions start .. start+num_rows-1."""

    request_id: RequestId
    start: int
    num_rows: int


class Features(Message, frozen=True, kw_only=True):
    """Fused hidden rows of committed tokens, all sequences' one after another in the one tensor frame that follows."""

    epoch: int  # the target's; rows of an older one may belong to tokens that were never committed
    rows: list[FeatureRows]
    tensor: TensorSpec  # (sum of num_rows, H)


FrontendToScheduler = Hello | Heartbeat | Submit | Cancel | MetricsRequest | CacheRequest
WorkerToScheduler = Hello | Heartbeat | Ready | StepResult | WorkerFailed | DraftReply | BlocksLoaded | BlocksArchived
ToScheduler = FrontendToScheduler | Ready | StepResult | WorkerFailed | DraftReply | BlocksLoaded | BlocksArchived
ToFrontend = Welcome | Heartbeat | SayHello | Outputs | Rejected | EngineStatus | MetricsPage | CacheReply | Drain
ToTarget = Welcome | Heartbeat | SayHello | Step | Release | LoadBlocks | ClearArchive | Drain
ToDrafter = Welcome | Heartbeat | SayHello | DraftRequest | Drain
