"""The server's life: warm up, say hello, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from lutserve.compat import init_logger

logger = init_logger("vllm.lutserve.server")

#: plain prose for the warm-up request: it also shows the outlier columns to layers that look for them
WARM_UP_TEXT = (
    "The lighthouse keeper wrote down the weather every evening: wind from the west, 12 knots, rain after "
    "midnight. In 1907 the lamp was changed to electricity, and the old oil store became a small school. "
    "def area(r): return 3.14159 * r ** 2  # square metres. She asked, “How far is it to the harbour?” "
    "About seven kilometres, said the boy, if the tide is low and you do not mind the mud."
)


class Lifecycle:
    """One server's state. `draining` is read by the gate on every request."""

    def __init__(self) -> None:
        self.draining = False
        self.inside = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as running while the block runs."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def drain(self, engine_client: Any, server: Any, grace: float) -> None:
        """Refuse new requests, let running ones finish, then end the server, all within `grace` seconds."""
        if self.draining:
            # A second signal means now.
            server.force_exit = server.should_exit = True
            return
        self.draining = True
        # The engine and its worker need a few seconds to end.
        patience = max(grace - 5.0, grace / 2)
        logger.info("draining: %d requests running, at most %g s", self.inside, patience)
        if not await self._empty(patience, server):
            logger.warning("aborting %d requests that outlast the grace time", self.inside)
            # An aborted request ends its stream in order; one whose engine is killed would hang.
            await engine_client.abort(list(engine_client.output_processor.request_states), internal=True)
            server.force_exit = not await self._empty(2.0, server)
        server.should_exit = True

    async def _empty(self, seconds: float, server: Any) -> bool:
        """Wait until no request is inside, at most so long; return whether that came true."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self.inside and loop.time() < deadline and not server.should_exit:
            await asyncio.sleep(0.05)
        return not self.inside

    async def take_signals(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Once vLLM's server runs, replace its signal handlers by ours and print how to talk to it."""
        while not getattr(getattr(state, "server", None), "started", False):
            await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        def on_signal() -> None:
            tasks.add(loop.create_task(self.drain(engine_client, state.server, args.shutdown_timeout)))

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        print(greeting(args), flush=True)


#: vLLM runs one API server in this process, and its middleware is built without arguments
LIFECYCLE = Lifecycle()


async def warm_up(engine_client: Any) -> None:
    """Run one request with logprobs through the engine, so that no user pays for first-use work."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=1, prompt_logprobs=1)
    async for _ in engine_client.generate(WARM_UP_TEXT, params, request_id="lutserve-warm-up"):
        pass


def greeting(args: Namespace) -> str:
    """Return the copy-paste lines printed when the server is ready."""
    host = "127.0.0.1" if args.host in (None, "0.0.0.0", "::") else args.host
    url = f"http{'s' if args.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{args.port}"
    name = args.served_model_name[0] if args.served_model_name else args.model
    header = ' -H "Authorization: Bearer $KEY"' if args.api_key else ""
    key = "KEY" if args.api_key else "none"
    return f"""
lutserve is ready at {url}

    curl {url}/v1/completions{header} -H 'Content-Type: application/json' \\
        -d '{{"model": "{name}", "prompt": "The capital of France is", "max_tokens": 16}}'

    from openai import OpenAI
    client = OpenAI(base_url="{url}/v1", api_key="{key}")
    print(client.completions.create(model="{name}", prompt="The capital of France is").choices[0].text)
"""
