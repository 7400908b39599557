"""Sites, metrics and counters through the real server, by its own flags."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from families import write
from servers import SMALL

from lutserve.server.client import running_server

pytestmark = pytest.mark.slow


def test_sites_of_a_served_model(tmp_path: Path) -> None:
    model = write(tmp_path / "qwen3_moe", "qwen3_moe")
    sites = "silu,rsqrt"
    args = ["--model", str(model), "--lut", "nli-4", "--lut-sites", sites, "--lut-count-saturations", *SMALL]
    args += ["--max-model-len", "256"]
    with (
        running_server(args, log=tmp_path / "log") as server,
        httpx.Client(base_url=server.base_url, timeout=120) as client,
    ):
        body = {"model": server.model, "prompt": "The river", "max_tokens": 8, "temperature": 0}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] > 0
        found = client.get("/lutserve/sites").json()
        assert client.get("/lutserve/recipe").json()["count_saturations"] is True
        metrics = client.get("/metrics").text
    assert len(found) == 2 * (1 + 4) + 1
    experts = [site for site in found if site["site"] == "silu"]
    assert [site["module"] for site in experts] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    table = experts[0]["table"]
    assert f'lutserve:recipe_info{{choice="nli-4",site="silu",table="{table}"}} 1.0' in metrics
    assert 'lutserve:recipe_info{choice="exact",site="softmax_exp",table=""} 1.0' in metrics
    assert 'lutserve:lut_saturations_total{site="silu"} ' in metrics
    assert 'site="rsqrt"} ' not in metrics.partition("lutserve:lut_saturations_total")[2]
