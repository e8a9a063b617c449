"""The key that clients must send, for both servers: all but /health is closed without it.

vLLM's own check covers `/v1` and leaves `/invocations`, which generates as well, `/metrics` and others open.
"""

from __future__ import annotations

import hmac
import json
import os
from typing import Any, Final

KEY_VARIABLE: Final = "VLLM_API_KEY"
MIDDLEWARE: Final = f"{__name__}.RequireKey"
OPEN: Final = "/health"


class RequireKey:
    """ASGI middleware: 401 for whoever does not send the key in VLLM_API_KEY, where there is one."""

    def __init__(self, app: Any) -> None:
        key = os.environ.get(KEY_VARIABLE)
        self.app = app
        self.expected = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it before its body is read."""
        if scope["type"] not in ("http", "websocket") or self._allowed(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            message = "a valid key is needed: Authorization: Bearer KEY"
            body = json.dumps(error_body(401, message)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _allowed(self, scope: dict[str, Any]) -> bool:
        if self.expected is None or (scope["type"] == "http" and scope["path"] == OPEN):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self.expected)


def error_body(code: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's API and vLLM give it."""
    kinds = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}
    kind = kinds.get(code, "BadRequestError" if code < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
