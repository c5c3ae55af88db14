"""The Ray adapters: the only room of the library that imports ray. It places what `tasks/` computes.

Nothing is imported here: Ray starts processes that need one module of these, and each other one would cost them seconds.
"""

import os

# Workers run in the environment that the driver runs in. Under `uv run` Ray would rebuild that on every worker from the project's
# files, over the network; it reads this switch when it is first imported.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
