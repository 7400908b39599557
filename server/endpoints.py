"""Our HTTP routes, attached to vLLM's app (`vllm.endpoint_plugins`)."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request

from lutserve.compat import recipe_of, with_cancellation
from lutserve.recipe import Recipe
from lutserve.server.lifecycle import LIFECYCLE, warm_up
from lutserve.server.metrics import COLLECTOR
from lutserve.server.scoring import ScoreRequest, ScoreResponse, score


class LutserveEndpoints:
    """Serves /lutserve/recipe, /layers, /sites and /score, and keeps our gauges fresh."""

    name = "lutserve_http"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes to the app."""
        router = APIRouter(prefix="/lutserve", tags=["lutserve"])

        @router.get("/recipe")
        async def recipe(request: Request) -> dict[str, Any]:
            """The recipe being served."""
            served: Recipe = request.app.state.lutserve_recipe
            return served.to_config()

        @router.get("/layers")
        async def layers(request: Request) -> list[dict[str, Any]]:
            """Method, kernel, bits and outlier columns of every linear layer, as they are now."""
            await COLLECTOR.refresh(request.app.state.engine_client)
            reports: list[dict[str, Any]] = COLLECTOR.layers
            return reports

        @router.get("/sites")
        async def sites(request: Request) -> list[dict[str, Any]]:
            """Module, function and table of every nonlinear site that is not exact."""
            await COLLECTOR.refresh(request.app.state.engine_client)
            reports: list[dict[str, Any]] = COLLECTOR.sites
            return reports

        @router.get("/score")
        async def scoring(request: Request) -> dict[str, bool]:
            """Whether POST works here, and whether it computes common beginnings of prompts once."""
            shares: bool | None = request.app.state.lutserve_shares_rows
            return {"available": shares is not None, "shares_rows": bool(shares)}

        @router.post("/score")
        @with_cancellation  # type: ignore[untyped-decorator]
        async def score_questions(body: ScoreRequest, raw_request: Request) -> ScoreResponse:
            """Log-probabilities of continuations of contexts, all given as token ids."""
            state = raw_request.app.state
            if state.lutserve_shares_rows is None:
                raise HTTPException(
                    501, "this server cannot score; use /v1/completions with echo and logprobs"
                )
            return await score(state.engine_client, body)

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Warm the engine up before the first request can arrive, and prepare the life that follows."""
        if engine_client is None:
            return
        state.lutserve_recipe = recipe_of(engine_client.vllm_config) or Recipe()
        state.lutserve_shares_rows = None
        if engine_client.model_config.runner_type == "generate":
            await warm_up(engine_client)
            state.lutserve_shares_rows = (await engine_client.collective_rpc("lutserve_prepare_scoring"))[0]
        await COLLECTOR.refresh(engine_client)
        # Kept on the state: the event loop itself holds tasks only weakly.
        state.lutserve_life = asyncio.create_task(LIFECYCLE.take_signals(engine_client, state, args))
