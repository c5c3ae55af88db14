"""The reader on a Serve that others use too: nothing of theirs is replaced or taken down."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.soak  # Serve is started and ended for each: minutes on two cores


def test_what_others_deployed_stays(ray_here: None) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from serve.reader import serving
    from serve.settings import ReaderAppSettings, TransformersSettings
    from stairstep.settings import InputError, UnreachableError

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Another:
        """Somebody else's application."""

        def __call__(self) -> str:
            return "theirs"

    def applications() -> set[str]:
        return set(serve.status().applications)

    ours = ReaderAppSettings(engine=TransformersSettings(cpus=0.1))
    try:
        with serving(ours) as url:
            port = httpx.URL(url).port
            assert port is not None
            serve.run(Another.bind(), name="another", route_prefix="/another")
            for chosen in (port, 1):
                with pytest.raises(InputError, match="has an application 'reader', which is not replaced"), serving(ours, chosen):
                    pass
            assert httpx.get(f"{url}/models", timeout=60, trust_env=False).json()["data"][0]["id"] == "tiny-reader"
        assert applications() == {"another"}, "Serve began with the reader, but serves others as well"

        with pytest.raises(InputError, match=rf"listens at 127\.0\.0\.1:{port} and nowhere else"), serving(ours, 1):
            pass
        missing = replace(ours, engine=TransformersSettings(model=str(Path("no") / "such"), cpus=0.1))
        with pytest.raises(UnreachableError, match="the reader did not start"), serving(missing, port):
            pass
        assert applications() == {"another"}

        with serving(ours, port):
            assert applications() == {"another", "reader"}
            theirs = {"engine": {"cpus": 0.1}, "name": "theirs"}
            app = {"name": "reader", "route_prefix": "/", "import_path": "serve.reader:build", "args": theirs}
            config = ServeDeploySchema.model_validate({"applications": [app]})
            _get_global_client().deploy_apps(config, _blocking=True)  # `serve deploy`: somebody deploys over it
        assert applications() == {"another", "reader"}
        with pytest.raises(InputError, match="is not replaced"), serving(ours, port):
            pass
        assert httpx.get(f"{url}/models", timeout=60, trust_env=False).json()["data"][0]["id"] == "theirs"
        serve.delete("reader")
        serve.run(Another.bind(), name="root", route_prefix="/")
        with pytest.raises(UnreachableError, match="root"), serving(ours, port):
            pass
        assert applications() == {"another", "root"}
    finally:
        serve.shutdown()


def test_a_port_is_not_shared(ray_here: None) -> None:
    import ray

    from serve.reader import serving
    from stairstep.settings import InputError

    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port: something listens at 127\.0\.0\.1:{port}"), serving(port=port):
            pass
    assert not [one for one in ray.util.list_named_actors(all_namespaces=True) if "SERVE" in one["name"]], "nothing was started for it"
