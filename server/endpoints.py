"""Our HTTP routes, attached to vLLM's app (`vllm.endpoint_plugins`)."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request

from lutserve.compat import recipe_of
from lutserve.recipe import Recipe
from lutserve.server.lifecycle import LIFECYCLE, warm_up
from lutserve.server.metrics import COLLECTOR


class LutserveEndpoints:
    """Serves /lutserve/recipe, /lutserve/layers and /lutserve/sites, and keeps our gauges fresh."""

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

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Warm the engine up before the first request can arrive, and prepare the life that follows."""
        if engine_client is None:
            return
        state.lutserve_recipe = recipe_of(engine_client.vllm_config) or Recipe()
        if engine_client.model_config.runner_type == "generate":
            await warm_up(engine_client)
        await COLLECTOR.refresh(engine_client)
        # Kept on the state: the event loop itself holds tasks only weakly.
        state.lutserve_life = asyncio.create_task(LIFECYCLE.take_signals(engine_client, state, args))
