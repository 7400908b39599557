"""A tiny OpenAI-compatible server with made-up, exactly known log-probabilities, which counts requests.

It stands in for a model where the subject of a test is what *our client code* asks and remembers.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def logprob(before: int, token: int) -> float:
    """The log-probability of a token after another one."""
    return -0.01 - (31 * before + 7 * token) % 97 / 16


@dataclass
class Fake:
    """What a test can see and set."""

    root: str
    max_model_len: int = 4096
    recipe: dict[str, Any] | None = field(default_factory=lambda: {"quant_method": "lutserve"})
    #: whether it has our scoring route
    scores: bool = True
    #: completion and scoring requests so far that were answered
    answered: int = 0
    #: after so many answers every further one fails with this HTTP status
    fail_after: int | None = None
    fail_status: int = 500
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "fake", "root": self.root, "max_model_len": self.max_model_len}]}
        if path == "/lutserve/recipe" and self.recipe is not None:
            return 200, self.recipe
        if path == "/lutserve/score" and self.scores:
            return 200, {"available": True, "shares_rows": True}
        return (200, {}) if path == "/health" else (404, {})

    def post(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            if self.fail_after is not None and self.answered >= self.fail_after:
                return self.fail_status, {"error": "told to fail"}
            self.answered += 1
        if path == "/lutserve/score":
            return 200, {"scores": [self.score(**question) for question in request["questions"]]}
        prompts = request["prompt"] if isinstance(request["prompt"][0], list) else [request["prompt"]]
        return 200, {"choices": [self.choice(request, index, ids) for index, ids in enumerate(prompts)]}

    def score(self, context: list[int], continuations: list[list[int]]) -> list[dict[str, Any]]:
        return [
            {
                "logprobs": [logprob(*pair) for pair in itertools.pairwise([context[-1], *tokens])],
                "greedy": [True] * len(tokens),
            }
            for tokens in continuations
        ]

    def choice(self, request: dict[str, Any], index: int, ids: list[int]) -> dict[str, Any]:
        scores = [logprob(*pair) for pair in itertools.pairwise(ids)]
        choice: dict[str, Any] = {"index": index, "text": f" answer {sum(ids) % 10}", "logprobs": None}
        if request.get("echo"):
            values = [None, *scores, -1.0]
            choice["logprobs"] = {
                "token_logprobs": values,
                "top_logprobs": [None if value is None else {"x": value} for value in values],
            }
        return choice


class _Handler(BaseHTTPRequestHandler):
    fake: Fake
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(*self.fake.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*self.fake.post(self.path, body))

    def _send(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed on purpose is no news."""


@contextmanager
def fake_server(root: str, port: int = 0, **settings: Any) -> Iterator[Fake]:
    """Serve on a port (default: a free one) of 127.0.0.1 for the length of a `with` block."""
    fake = Fake(root, **settings)
    handler = type("Handler", (_Handler,), {"fake": fake})
    with _Server(("127.0.0.1", port), handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
