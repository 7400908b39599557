"""The outermost ASGI middleware: who may come in, and whether anyone may."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lutserve.server.lifecycle import LIFECYCLE
from lutserve.server.metrics import COLLECTOR

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

#: the only path that needs no key: load balancers probe it
OPEN_PATHS = frozenset({"/health"})


class Gate:
    """Answers 503 while draining and 401 without the key; counts what is inside.

    vLLM's own key check covers only some prefixes (its /invocations completes without one), and its
    /health stays 200 while it drains. A plain ASGI class, because Starlette's base class would buffer
    the messages that tell a streaming handler of a client that went away.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one ASGI event."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        if LIFECYCLE.draining:
            return await _refuse(scope, send, 503, "the server is shutting down; retry elsewhere")
        if not _allowed(scope):
            return await _refuse(scope, send, 401, "missing or wrong API key (Authorization: Bearer KEY)")
        if scope["path"] == "/metrics":
            await COLLECTOR.refresh(scope["app"].state.engine_client)
        with LIFECYCLE.request():
            await self.app(scope, receive, send)


def _allowed(scope: Message) -> bool:
    keys = scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    keys = [key for key in keys if key]
    if not keys or scope["path"] in OPEN_PATHS or scope.get("method") == "OPTIONS":
        return True
    header = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, token = header.partition(b" ")
    # Digests, compared in constant time, so that a guess learns neither length nor prefix.
    digest = hashlib.sha256(token.strip()).digest()
    found = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return scheme.lower() == b"bearer" and any(found)


async def _refuse(scope: Message, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013 if status == 503 else 1008, "reason": message})
        return
    kind = "service_unavailable" if status == 503 else "authentication_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"retry-after", b"30") if status == 503 else (b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
