"""What the core sends: messages to peers in order, and each frontend's outputs of one event in one message."""

from __future__ import annotations

from collections import defaultdict

from scheduler.sequence import Sequence
from shared.messages import Message, Output, Outputs, TokenLogprob, Verified

Envelope = tuple[str, Message]
"""(receiver's instance id, message)"""


class Outbox:
    def __init__(self) -> None:
        self._envelopes: list[Envelope] = []
        self._outputs: defaultdict[str, list[Output]] = defaultdict(list)

    def send(self, receiver: str, message: Message) -> None:
        self._envelopes.append((receiver, message))

    def emit(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        verified: Verified | None = None,
        is_repeated: bool = False,
    ) -> None:
        """Tokens of a request that goes on; they are part of the sequence already."""
        output = Output(
            request_id=sequence.submit.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            start=len(sequence.token_ids) - sequence.num_prompt_tokens - len(token_ids),
            verified=verified,
            is_repeated=is_repeated,
        )
        self.put(sequence.frontend, output)

    def emit_token(
        self, sequence: Sequence, token_ids: list[int], start: int, logprobs: list[TokenLogprob] | None
    ) -> None:
        """As `emit`, for the one plain token that most rows of most steps bring.

        Args:
            start: output tokens before it.
        """
        self._outputs[sequence.frontend].append(
            Output(request_id=sequence.submit.request_id, token_ids=token_ids, start=start, logprobs=logprobs)
        )

    def put(self, frontend: str, output: Output) -> None:
        self._outputs[frontend].append(output)

    def take(self) -> list[Envelope]:
        """All that is to be sent now."""
        for frontend, outputs in self._outputs.items():
            self._envelopes.append((frontend, Outputs(outputs=outputs)))
        self._outputs.clear()
        envelopes, self._envelopes = self._envelopes, []
        return envelopes
