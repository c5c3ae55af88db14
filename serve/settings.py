"""Settings of the reader app: which engine answers, what a request may ask for, how many replicas there are, which key is wanted.

A key itself is never a setting: `key_env` names the environment variable that holds it, or whose `_FILE` twin names a file with it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from stairstep.models.sources import shipped_bases
from stairstep.settings import InputError, Node, SettingError, apply_overrides, build, from_plain, setting


@dataclass(frozen=True)
class TransformersSettings:
    """The model in this project's own reader, on the CPU: for laptops and tests; each request is answered alone."""

    kind: Literal["transformers"] = setting("transformers", doc="Which engine answers.")
    model: str = setting("tiny-reader", doc="A local folder, a hub id, or the name of a reader that ships in the package.")
    dtype: Literal["float32", "bfloat16"] = setting("float32", doc="Arithmetic of the model.")
    threads: int = setting(1, minimum=1, doc="Threads that compute in each replica; the same number gives the same bits.")
    cpus: float = setting(1.0, minimum=0, doc="CPUs that Ray reserves for each replica.")
    max_new_tokens: int = setting(48, minimum=1, doc="Most tokens of an answer where the request does not say.")
    max_visual_tokens: int = setting(1024, minimum=1, doc="Most visual tokens of an image; a larger one is shrunk.")
    min_visual_tokens: int = setting(4, minimum=1, doc="Fewest visual tokens of an image; a smaller one is enlarged.")
    max_model_len: int | None = setting(None, minimum=1, doc="Most tokens of prompt and answer; null = what the model is made for.")

    def check(self) -> None:
        """What one field alone cannot show."""
        if self.min_visual_tokens > self.max_visual_tokens:
            raise SettingError("min_visual_tokens", f"{self.min_visual_tokens} is more than max_visual_tokens = {self.max_visual_tokens}")


@dataclass(frozen=True)
class VllmSettings:
    """vLLM under `ray.serve.llm`: batches whatever is in flight, on GPUs (or, to try it, on a CPU)."""

    kind: Literal["vllm"] = setting("vllm", doc="Which engine answers.")
    model: str = setting("Qwen/Qwen3-VL-4B-Instruct", doc="A hub id, a local folder, or the name of a reader that ships in the package.")
    revision: str | None = setting(None, doc="Commit of the hub repository; null = its main branch.")
    device: Literal["cuda", "cpu"] = setting("cuda", doc="What computes.")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", doc="Arithmetic of the model; auto = the checkpoint's own.")
    max_model_len: int = setting(65536, minimum=1, doc="Most tokens of prompt and answer together.")
    gpu_memory_utilization: float = setting(0.8, above=0, maximum=1, doc="Share of a GPU's memory that vLLM may take.")
    prefix_caching: bool = setting(True, doc="Keep the states of prompts that begin alike.")
    tensor_parallel: int = setting(1, minimum=1, doc="GPUs that one replica is spread over.")
    enforce_eager: bool = setting(False, doc="Start faster and answer more slowly: no CUDA graphs.")
    accelerator: str | None = setting(None, doc="Ray's name of the GPU type that a replica must be placed on; null = any.")
    cpu_cache_gb: int = setting(4, minimum=1, doc="GB of states that vLLM keeps where device is cpu.")

    def check(self) -> None:
        """What one field alone cannot show."""
        if self.device == "cpu" and (self.tensor_parallel > 1 or self.accelerator):
            raise SettingError("device", "cpu has no accelerator and no GPUs to spread over; leave out accelerator and tensor_parallel")


@dataclass(frozen=True)
class LimitSettings:
    """What one request may ask for, and how many a replica holds."""

    queue: int = setting(32, minimum=1, doc="Most requests that a replica holds at once, answered ones included; the next gets 429.")
    timeout_s: float = setting(120.0, above=0, doc="Seconds after which a request is given up, its waiting included.")
    max_images: int = setting(8, minimum=0, doc="Most images of a request.")
    max_image_mb: float = setting(20.0, above=0, doc="Most MB of one image's file.")
    max_image_pixels: int = setting(80_000_000, minimum=1, doc="Most pixels that an image may announce; it is refused undecoded.")
    max_body_mb: float = setting(64.0, above=0, doc="Most MB of a request's body.")


@dataclass(frozen=True)
class ReplicaSettings:
    """How many copies of the engine there are."""

    min: int = setting(1, minimum=0, doc="Fewest replicas; 0 = none while nobody asks.")
    max: int = setting(1, minimum=1, doc="Most replicas.")
    target: float = setting(2.0, above=0, doc="Requests in flight for each replica that autoscaling aims at.")
    resources: dict[str, float] = setting(
        doc="Custom resources of each replica (with vllm: of each of its GPUs), to place it on a node group.", factory=dict
    )

    def check(self) -> None:
        """What one field alone cannot show."""
        if self.min > self.max:
            raise SettingError("min", f"{self.min} is more than max = {self.max}")


@dataclass(frozen=True)
class ReaderAppSettings:
    """The reader app: `args` of serve/reader.yaml."""

    engine: TransformersSettings | VllmSettings = setting(factory=TransformersSettings, doc="What answers.")
    name: str | None = setting(None, doc="The model's name in requests; null = engine.model as it is written.")
    key_env: str | None = setting(
        None, doc="Name of the environment variable that holds the API key (with _FILE appended: of a file with it); null = no key."
    )
    limits: LimitSettings = setting(factory=LimitSettings, doc="What a request may ask for.")
    replicas: ReplicaSettings = setting(factory=ReplicaSettings, doc="How many copies of the engine there are.")

    def check(self) -> None:
        """A secret written where its variable's name belongs is refused without being repeated."""
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.key_env):
            raise SettingError("key_env", "expected the name of an environment variable like READER_API_KEY, never the key itself")

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.name or self.engine.model


def app_settings(args: Mapping[str, Any] | ReaderAppSettings | Node | None) -> ReaderAppSettings:
    """Settings from the `args` of a Serve config, from a command line's dotted keys (`engine.model=…`), or of a larger class."""
    if isinstance(args, ReaderAppSettings):
        return ReaderAppSettings(**{one.name: getattr(args, one.name) for one in fields(ReaderAppSettings)})
    if isinstance(args, Node):
        return build(ReaderAppSettings, args)
    given = dict(args or {})
    dotted = [f"{key}={given.pop(key)}" for key in list(given) if "." in key]
    return build(ReaderAppSettings, apply_overrides(from_plain(given, "args"), dotted))


def is_loopback(host: str | None) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address((host or "").strip("[]").split("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def check_host(settings: ReaderAppSettings, host: str) -> None:
    """Whoever listens to other machines asks for a key."""
    if settings.key_env is None and not is_loopback(host):
        raise InputError(
            f"host: {host} can be reached from other machines, so an API key is required: say key_env=READER_API_KEY and put the key into "
            "that variable (or the path of a file with it into READER_API_KEY_FILE), or listen on 127.0.0.1"
        )


def model_source(name: str) -> str:
    """What an engine loads: the folder of a shipped reader, or the name as it is."""
    shipped = shipped_bases().get(name)
    return str(shipped) if shipped is not None else name
