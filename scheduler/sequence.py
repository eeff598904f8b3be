"""One request's tokens and how far they are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.messages import FinishReason, MediaItem, Submit, Timings


@dataclass(eq=False)
class Sequence:
    """A request inside the scheduler.

    Positions 0 .. num_scheduled-1 were sent to the target in this incarnation; `num_pending` sampled tokens are not
    read
    yet, so the sequence's true length is len(token_ids) + num_pending. Prefill, prefix hits, preemption, recovery and
    decode are all the same: num_scheduled catches up with that length.
    """

    submit: Submit
    frontend: str
    arrival: float
    order: tuple[float, int]  # smaller runs first
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_length: int = field(init=False)  # prompt and output tokens at the end
    stop_token_ids: frozenset[int] = field(init=False)  # those that end the output right away
    slot: int | None = None
    capacity: int = 0
    num_scheduled: int = 0
    num_pending: int = 0
    num_encoded: int = 0  # media that the encoder was sent in this incarnation, or that it need not see
    is_started: bool = False  # the target knows this incarnation
    incarnation: int = 0  # grows with preemption and recovery; results of an older one are dropped
    finish_reason: FinishReason | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    charged: float = 0.0  # to its tenant; see waiting.py
    num_strikes: int = 0  # how much it is suspected of having killed targets; see suspects.py
    num_proving_tokens: int = 0  # output tokens at which it no longer is

    # prefix cache
    block_hashes: list[bytes] = field(default_factory=list)
    num_kept_blocks: int = 0  # of these blocks the cache knows: restored, stored, or somebody else's
    stored_hashes: list[bytes] = field(default_factory=list)  # by this sequence in this incarnation
    restore: list[int] = field(default_factory=list)  # blocks that the slot starts with
    restore_state: int | None = None
    state: tuple[int, int] | None = None  # (id, position) of the recurrent state kept last
    load_id: int | None = None  # archived blocks are on their way
    was_loaded: bool = False
    is_held: bool = False  # its start waits for blocks that another sequence computes, or that are loaded

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.submit.prompt_token_ids)
        self.token_ids = [*self.submit.prompt_token_ids, *self.submit.output_token_ids]
        self.max_length = self.num_prompt_tokens + self.submit.max_tokens
        self.stop_token_ids = frozenset(self.submit.stop_token_ids)

    @property
    def marks(self) -> list[tuple[int, int, bytes]]:
        """Media segments: (first position, positions, content hash)."""
        return [(item.start, item.num_tokens, item.content_hash) for item in self.submit.media]

    def next_media(self) -> tuple[int, MediaItem] | None:
        """The first segment that reaches behind what is scheduled and was not sent to the encoder, with its index."""
        for index, item in enumerate(self.submit.media[self.num_encoded :], self.num_encoded):
            if item.start + item.num_tokens > self.num_scheduled:
                return index, item
        return None

    @property
    def is_running(self) -> bool:
        return self.slot is not None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Input positions that the target was not sent yet. 1 is a decode, more is a prefill, 0 waits for a result."""
        return len(self.token_ids) + self.num_pending - self.num_scheduled

    @property
    def wants_more(self) -> bool:
        """Another sampled token is wanted once those in flight have come."""
        return self.finish_reason is None and len(self.token_ids) + self.num_pending < self.max_length

    def rewind(self) -> None:
        """Give up everything computed: preemption, or a new target."""
        self.slot = None
        self.capacity = 0
        self.num_scheduled = 0
        self.num_pending = 0
        self.num_encoded = 0
        self.is_started = False
        self.is_held = False
        self.incarnation += 1
        self.block_hashes = []
        self.num_kept_blocks = 0
        self.stored_hashes = []
        self.restore, self.restore_state, self.state, self.load_id = [], None, None, None

    def timings(self, now: float) -> Timings:
        scheduled = self.first_scheduled if self.first_scheduled is not None else now
        first = self.first_token if self.first_token is not None else now
        return Timings(
            queue_s=scheduled - self.arrival,
            prefill_s=first - scheduled,
            decode_s=now - first,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_preemptions=self.num_preemptions,
        )
