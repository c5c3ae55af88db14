"""The Ray adapters: the only room of the library that imports ray. It places what `tasks/` computes."""

import os

# Workers run in the environment that the driver runs in. Under `uv run` Ray would rebuild that on every worker from the project's
# files, over the network; it reads this switch when it is first imported.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

from .preprocess import preprocess_on_ray
from .session import ray_session
from .train import train_on_ray

__all__ = ["preprocess_on_ray", "ray_session", "train_on_ray"]
