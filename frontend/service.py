"""What every endpoint needs: the model's side, the engine, settings. Made once per process."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import ClientDisconnect, Request

from frontend import tokenizer
from frontend.detokenize import Detokenizer
from frontend.drain import Door
from frontend.engine_protocol import Engine
from frontend.model_change import ModelChange
from frontend.model_side import ModelSide
from frontend.responses.state import Responses
from frontend.streams import ClientGone
from frontend.tracing import Tracing
from shared.config import Settings
from shared.errors import ContextLength, InvalidRequest, NotFound, TooLarge, TooSlow

# Longer texts are tokenized in a thread (the library lets go of the interpreter); 8,192 characters take about 1 ms.
INLINE_CHARS = 8192
# No vocabulary has longer tokens; a text longer than this for each token of context cannot fit.
MAX_CHARS_PER_TOKEN = 256


class Service:
    """Shared by all requests; immutable but for the engine's state, the stored responses and a change of the model."""

    def __init__(
        self,
        settings: Settings,
        side: ModelSide,
        engine: Engine,
        tracing: Tracing | None = None,
    ) -> None:
        self.first_settings = settings  # as they were at the start, before any change of the model
        self.engine = engine
        self.tracing = tracing  # None: switched off
        self.started_at = int(time.time())
        self.adopt(side)
        self.door = Door()
        self.responses = Responses(settings, self.door)
        self.model_change = ModelChange(self)

    def adopt(self, side: ModelSide) -> None:
        """This is the model from now on. No request may be between its prompt and its answer."""
        self.settings = side.settings
        self.model_name, self._model_ids, self.adapters = side.model_name, side.names, side.adapters
        self.text, self.pieces, self.template = side.text, side.pieces, side.template
        self.segments = side.segments
        self.media, self.grammars, self.output_format = side.media, side.grammars, side.output_format

    @property
    def vocab_size(self) -> int:
        """Ids that the model takes: its embedding may have more rows than the tokenizer has tokens."""
        info = self.engine.target_info
        return info.vocab_size if info is not None else self.pieces.vocab_size

    @property
    def max_model_len(self) -> int | None:
        """None until a target has been ready once."""
        info = self.engine.target_info
        return info.max_model_len if info is not None else None

    @property
    def modalities(self) -> list[str]:
        """What the model takes."""
        return ["text", *(self.media.modalities if self.media is not None else [])]

    def check_model(self, model: str) -> None:
        """Raises NotFound for a name that is neither the served model's nor an adapter's."""
        if model not in self._model_ids and model not in self.adapters:
            served = f"{self.model_name!r} (or 'default') is served"
            if self.adapters:
                served += ", with the adapters " + ", ".join(map(repr, self.adapters))
            raise NotFound(f"no model {model!r} here; {served}", param="model")

    def adapter_of(self, model: str) -> str:
        """The LoRA adapter that a request's `model` names; "" for the base model."""
        return model if model in self.adapters else ""

    def shown_name(self, model: str) -> str:
        """What an answer calls the model that a request's `model` named."""
        return self.adapter_of(model) or self.model_name

    def detokenizer(
        self, *, skip_special_tokens: bool, is_text_start: bool, markers: frozenset[str] = frozenset()
    ) -> Detokenizer:
        """`markers` are shown even if they are special tokens."""
        ids = (self.text.tokenizer.token_to_id(marker) for marker in markers)
        return Detokenizer(
            self.text.tokenizer,
            self.pieces,
            skip_special_tokens=skip_special_tokens,
            is_text_start=is_text_start,
            shown_ids=frozenset(i for i in ids if i is not None),
        )

    async def encode(self, text: str, *, add_special_tokens: bool, param: str, salt: str | None = None) -> list[int]:
        """The text's tokens.

        Args:
            salt: whose text it is: long parts of a conversation are remembered for the next one with the same salt.
        Raises:
            InvalidRequest: the text has a lone surrogate, or is far longer than the context.
        """
        limit = self.max_model_len
        if limit is not None and len(text) > limit * MAX_CHARS_PER_TOKEN:
            raise ContextLength(
                f"{param} has {len(text)} characters; this model's context is {limit} tokens", param=param
            )
        try:
            if len(text) <= INLINE_CHARS:
                return tokenizer.encode(self.text.tokenizer, text, add_special_tokens=add_special_tokens)
            if salt is not None and not add_special_tokens:
                return await asyncio.to_thread(self.segments.encode, text, salt)
            return await asyncio.to_thread(
                tokenizer.encode, self.text.tokenizer, text, add_special_tokens=add_special_tokens
            )
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"{param} is not valid Unicode text", param=param) from error


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service), "set by create_app"
    return service


async def read_body(request: Request) -> bytes:
    """The request's body.

    Raises:
        TooLarge: it is larger than the setting allows.
        TooSlow: it did not arrive in time.
        ClientGone: the connection ended before it was complete.
    """
    settings = service_of(request).settings
    too_large = TooLarge(f"the body is larger than {settings.max_body_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > settings.max_body_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise TooSlow(f"the body did not arrive within {settings.body_timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise ClientGone("the client left while sending its request") from error
    return b"".join(parts)
