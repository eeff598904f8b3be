"""The exceptions for outside input, in one small tree.

    TandemError
    ├── InvalidRequest        400  a field is missing, misspelt, unsupported or out of range
    │   └── ContextLength     400  prompt and output do not fit into the context window
    ├── NotFound              404  no such model, response or request
    ├── Busy                  429  the queue is full; try again after `retry_after_s`
    ├── Unavailable           503  no target worker is ready
    ├── EngineFailure         500  the engine could not finish an accepted request
    │   ├── PoisonRequest     500  it was being worked on each time the target died
    │   └── DeadlineExceeded  504  the client's own time limit passed
    ├── TooSlow               408  a body that does not arrive in time
    ├── TooLarge              413  a body beyond the limit
    ├── HeadTooLarge          431  a head beyond the limit
    ├── Forbidden             403  this needs the admin key
    ├── BadMessage            -    bytes on a socket that are not one of our messages
    ├── BadConfig             -    a setting or environment variable that is not ours; stops start-up
    └── BadModel              -    a model folder or file that cannot be loaded; stops start-up

`HTTP_STATUS` is the only place that maps an error code to a status.
"""

from __future__ import annotations


class TandemError(Exception):
    """Base of all errors that outside input can cause."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(TandemError):
    code = "invalid_request_error"


class ContextLength(InvalidRequest):
    code = "context_length_exceeded"


class NotFound(TandemError):
    code = "not_found"


class Busy(TandemError):
    code = "rate_limit_exceeded"


class Unavailable(TandemError):
    code = "service_unavailable"


class EngineFailure(TandemError):
    code = "engine_failure"


class PoisonRequest(EngineFailure):
    code = "poison_request"


class DeadlineExceeded(EngineFailure):
    code = "deadline_exceeded"


class TooLarge(TandemError):
    code = "body_too_large"


class HeadTooLarge(TandemError):
    code = "head_too_large"


class TooSlow(TandemError):
    code = "request_timeout"


class Forbidden(TandemError):
    code = "forbidden"


class BadMessage(TandemError):
    code = "bad_message"


class BadConfig(TandemError):
    code = "bad_config"


class BadModel(TandemError):
    code = "bad_model"


HTTP_STATUS: dict[str, int] = {
    InvalidRequest.code: 400,
    ContextLength.code: 400,
    NotFound.code: 404,
    Busy.code: 429,
    Unavailable.code: 503,
    EngineFailure.code: 500,
    PoisonRequest.code: 500,
    DeadlineExceeded.code: 504,
    TooLarge.code: 413,
    HeadTooLarge.code: 431,
    TooSlow.code: 408,
    Forbidden.code: 403,
    TandemError.code: 500,
}
_BY_CODE: dict[str, type[TandemError]] = {
    c.code: c
    for c in (
        InvalidRequest,
        ContextLength,
        NotFound,
        Busy,
        Unavailable,
        EngineFailure,
        PoisonRequest,
        DeadlineExceeded,
    )
}


def from_code(code: str, message: str, retry_after_s: float | None = None) -> TandemError:
    """The exception for a code that came over the wire; an unknown code becomes EngineFailure."""
    return _BY_CODE.get(code, EngineFailure)(message, retry_after_s=retry_after_s)
