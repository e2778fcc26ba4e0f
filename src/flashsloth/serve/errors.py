"""Errors as OpenAI's clients read them."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, REQUEST_TIMEOUT = 400, 401, 404, 408
TOO_LARGE, UNSUPPORTED_MEDIA, UNPROCESSABLE, TOO_MANY = 413, 415, 422, 429
INTERNAL, UNAVAILABLE = 500, 503
KINDS = {
    UNAUTHORIZED: "authentication_error",
    TOO_MANY: "rate_limit_error",
    INTERNAL: "server_error",
    UNAVAILABLE: "server_error",
}


class ApiError(Exception):
    """A request that is refused, or cannot be answered.

    Args:
        status: HTTP status.
        message: the cause and the remedy.
        param: the field at fault, as `messages.0.content`.
        code: a word for programs.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        error = {
            "message": _well_formed(self.message),
            "type": KINDS.get(self.status, "invalid_request_error"),
            "param": None if self.param is None else _well_formed(self.param),
            "code": self.code,
        }
        return {"error": error}

    def headers(self) -> Mapping[str, str]:
        if self.status == UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=dict(self.headers()))


def _well_formed(text: str) -> str:
    """JSON from clients may hold halves of surrogate pairs, which no answer can carry."""
    return text.encode("utf-8", "replace").decode()
