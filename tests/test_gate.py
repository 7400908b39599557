from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from lutserve.server.gate import Gate
from lutserve.server.lifecycle import LIFECYCLE, Lifecycle


class Engine:
    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={"a": None})
        self.aborted: list[str] = []

    async def abort(self, ids: list[str], internal: bool) -> None:
        assert internal
        self.aborted += ids


def call(
    path: str, *, keys: list[str] | None, header: bytes | None = None, method: str = "GET"
) -> tuple[int, Any]:
    """Send one request through a Gate with an app behind it that answers 200."""
    sent: list[dict[str, Any]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        assert LIFECYCLE.inside == 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message: Any) -> None:
        sent.append(message)

    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=keys), engine_client=None))
    headers = [(b"authorization", header)] if header else []
    scope = {"type": "http", "path": path, "method": method, "headers": headers, "app": app}
    asyncio.run(Gate(inner)(scope, None, send))  # type: ignore[arg-type]
    assert LIFECYCLE.inside == 0
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/invocations", "/tokenize", "/docs", "/lutserve/recipe"]
)
def test_a_key_guards_every_route(path: str) -> None:
    assert call(path, keys=None)[0] == 200
    assert call(path, keys=["k1", "k2"])[0] == 401
    assert call(path, keys=["k1", "k2"], header=b"Bearer k3")[0] == 401
    assert call(path, keys=["k1", "k2"], header=b"Basic k1")[0] == 401
    assert call(path, keys=["k1", "k2"], header=b"Bearer k2")[0] == 200
    assert call(path, keys=["k1"], method="OPTIONS")[0] == 200


def test_health_is_open_and_the_environment_may_hold_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("/health", keys=["k"])[0] == 200
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert call("/version", keys=None)[0] == 401
    assert call("/version", keys=None, header=b"bearer secret")[0] == 200


@pytest.mark.parametrize("path", ["/health", "/v1/completions"])
def test_draining_answers_503(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIFECYCLE, "draining", True)
    status, body = call(path, keys=None)
    assert status == 503
    assert body["error"]["message"] == "the server is shutting down; retry elsewhere"


def test_drain_waits_for_running_requests() -> None:
    async def scene() -> tuple[bool, list[str]]:
        life, engine = Lifecycle(), Engine()
        server = SimpleNamespace(should_exit=False, force_exit=False)
        with life.request():
            task = asyncio.create_task(life.drain(engine, server, grace=20))
            await asyncio.sleep(0.2)
            assert life.draining and not server.should_exit
        await task
        return server.should_exit and not server.force_exit, engine.aborted

    assert asyncio.run(scene()) == (True, [])


def test_drain_aborts_what_outlasts_the_grace_time_and_a_second_signal_means_now() -> None:
    async def scene() -> None:
        life, engine = Lifecycle(), Engine()
        server = SimpleNamespace(should_exit=False, force_exit=False)
        with life.request():
            await life.drain(engine, server, grace=0.2)
        assert engine.aborted == ["a"]
        assert server.should_exit and server.force_exit

        life, server = Lifecycle(), SimpleNamespace(should_exit=False, force_exit=False)
        with life.request():
            task = asyncio.create_task(life.drain(engine, server, grace=60))
            await asyncio.sleep(0.1)
            await life.drain(engine, server, grace=60)
            assert server.should_exit and server.force_exit
            await task

    asyncio.run(scene())
