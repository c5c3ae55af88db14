"""What stands before vLLM, with a stand-in for it: who and what is let through, and what vLLM is told to be."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Any

import httpx
import pytest
from fastapi import HTTPException, Request
from serve_requests import ask, image_part, page

from serve.door import ingress_app
from serve.settings import ReaderAppSettings, ReplicaSettings, VllmSettings, model_source
from stairstep.settings import InputError, to_plain

KEY = "READER_TEST_KEY"


class Engines(Exception):
    """An engine's own error."""

    status_code = 400
    message = "too long"


def served(**args: Any) -> httpx.AsyncClient:
    """The door over an application that tells how much it was given."""
    app = ingress_app({"engine": {"kind": "vllm"}, "name": "m", **args}, Engines)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        body = await request.json()
        if body.get("sleep"):
            await asyncio.sleep(body["sleep"])
        if body.get("fail"):
            raise HTTPException(body["fail"], "no") if body["fail"] != 499 else Engines()
        return {"images": sum(part["type"] == "image_url" for part in body["messages"][-1]["content"])}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": []}

    async def here(scope, receive, send):
        if scope["type"] == "http":
            scope = {**scope, "server": ("127.0.0.1", 80)}
        await app(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(here), base_url="http://127.0.0.1/v1")


def post(*bodies: Any, headers: dict[str, str] | None = None, **args: Any) -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        async with served(**args) as client:
            return await asyncio.gather(*(client.post("/chat/completions", json=body, headers=headers) for body in bodies))

    return asyncio.run(all_of_them())


def test_a_good_request_goes_through_as_it_came():
    [response] = post(ask("m", "Who?", [page(1), page(2)], temperature=0.7, stream=False))
    assert (response.status_code, response.json()) == (200, {"images": 2})


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (ask("other", "Who?", []), 404, "does not exist"),
        (ask("m", "Who?", [b"no image"]), 400, "image 1: this is not an image"),
        (ask("m", "Who?", [page(1), page(1)[:100]]), 400, "image 2: this PNG file is damaged"),
        (ask("m", "Who?", [page(1, 600, 600)]), 400, "limits.max_image_pixels = 300000"),
        (ask("m", "Who?", [page(1)] * 3), 400, "limits.max_images = 2"),
        ({"model": "m", "messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "video_url"),
        ([], 400, "not an object"),
        (ask("m", "Who?", [], fail=418), 418, "no"),
        (ask("m", "Who?", [], fail=499), 400, "too long"),
    ],
)
def test_a_bad_one_does_not(body, status, words):
    [response] = post(body, limits={"max_images": 2, "max_image_pixels": 300_000})
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_an_address_is_not_fetched():
    part = image_part(page(1))
    part["image_url"]["url"] = "http://127.0.0.1:9/page.png"
    [response] = post({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    assert "fetches nothing" in response.json()["error"]["message"]


def test_the_queue_is_bounded_and_empties():
    slow = ask("m", "Who?", [], sleep=0.3)
    statuses = sorted(one.status_code for one in post(*[slow] * 5, limits={"queue": 3}))
    assert statuses == [200, 200, 200, 429, 429]


def test_time_runs_out():
    [response] = post(ask("m", "Who?", [], sleep=5), limits={"timeout_s": 0.2})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"


def test_the_key_is_asked_for(monkeypatch):
    monkeypatch.setenv(KEY, "right")
    [wrong] = post(ask("m", "Who?", []), headers={"Authorization": "Bearer wrong"}, key_env=KEY)
    [right] = post(ask("m", "Who?", []), headers={"Authorization": "Bearer right"}, key_env=KEY)
    assert (wrong.status_code, right.status_code) == (401, 200)


def test_what_vllm_is_told_to_be():
    from serve.vllm_engine import deployment_options, engine_arguments

    told = engine_arguments(VllmSettings(), 16)
    assert told["max_model_len"] == 65536
    assert told["gpu_memory_utilization"] == 0.8
    assert told["limit_mm_per_prompt"] == {"image": 16, "video": 0}
    assert told["enable_prefix_caching"] is True
    assert "revision" not in told
    assert engine_arguments(VllmSettings(revision="abc"), 1)["revision"] == "abc"
    assert "gpu_memory_utilization" not in engine_arguments(VllmSettings(device="cpu"), 1)
    grows = deployment_options(ReaderAppSettings(replicas=ReplicaSettings(0, 4, 32)))
    assert grows["autoscaling_config"] == {"min_replicas": 0, "max_replicas": 4, "target_ongoing_requests": 32}
    assert grows["health_check_period_s"] > 0
    assert deployment_options(ReaderAppSettings())["num_replicas"] == 1


def test_replicas_are_placed_by_custom_resources():
    from serve.reader import application
    from serve.vllm_engine import _placement

    group = {"reader": 0.5}
    assert _placement(VllmSettings(), {}) == {}, "what ray.serve.llm asks for by itself"
    assert _placement(VllmSettings(), group) == {"placement_group_config": {"bundle_per_worker": {"GPU": 1, "reader": 0.5}}}
    assert _placement(VllmSettings(device="cpu"), group)["placement_group_config"] == {"bundles": [{"CPU": 1, "reader": 0.5}]}
    for resources in ({}, group):
        options = application({"replicas": {"resources": resources}})._bound_deployment.ray_actor_options
        assert options["resources"] == resources
        assert options["num_cpus"] == 1


def test_the_config_file_is_one_that_is_understood():
    from pathlib import Path

    import yaml
    from ray.serve.schema import ServeDeploySchema

    from serve.settings import app_settings

    tree = yaml.safe_load((Path(__file__).parents[2] / "serve" / "reader.yaml").read_text(encoding="utf-8"))
    assert ServeDeploySchema.model_validate(tree).http_options.host == "127.0.0.1"
    [application] = tree["applications"]
    assert application["import_path"] == "serve.reader:build"
    settings = app_settings(application["args"])
    assert isinstance(settings.engine, VllmSettings)
    assert to_plain(app_settings(to_plain(settings))) == to_plain(settings)
    assert tree["http_options"]["request_timeout_s"] > settings.limits.timeout_s


def test_shipped_models_are_found_by_name():
    assert model_source("tiny-reader").endswith("tiny-reader")
    assert model_source("Qwen/Qwen3-VL-4B-Instruct") == "Qwen/Qwen3-VL-4B-Instruct"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_it_says_what_to_install():
    from ray.serve.exceptions import RayServeException

    from serve.reader import application, build

    with pytest.raises(InputError, match=r"the engine vllm was asked for.* requirements/vllm\.txt .*kind: transformers"):
        application({"engine.kind": "vllm"})
    with pytest.raises(RayServeException, match=r"the engine vllm was asked for.* requirements/vllm\.txt"):
        build({"engine.kind": "vllm"})


def test_a_mistake_in_the_config_is_told_to_serve():
    from ray.serve.exceptions import RayServeException

    from serve.reader import build

    with pytest.raises(RayServeException, match=r"engine\.modle.*model"):
        build({"engine.modle": "tiny-reader"})


def test_reader_and_recipes_meet_at_one_port():
    from pathlib import Path

    import yaml

    from jobs.serve_reader import ServeSettings
    from stairstep.evaluation.readers import RemoteReaderSettings
    from stairstep.tasks import load_recipe

    root = Path(__file__).parents[2]
    shipped = yaml.safe_load((root / "serve" / "reader.yaml").read_text(encoding="utf-8"))["http_options"]
    assert (shipped["host"], shipped["port"]) == (ServeSettings().host, ServeSettings().port)
    asked = [
        RemoteReaderSettings().base_url,
        *(load_recipe(root / "recipes" / name).evaluation.reader.base_url for name in ("demo.yaml", "v8r.yaml")),
    ]
    assert {url.replace("localhost", "127.0.0.1") for url in asked} == {f"http://{shipped['host']}:{shipped['port']}/v1"}
