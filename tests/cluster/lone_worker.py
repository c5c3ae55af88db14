"""What workers of elastic runs do in tests that must see a group grow, however fast its steps are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def waiting_alone(step: int) -> Callable[[dict[str, Any]], Any]:
    """The workers' function, in which a group of one does not take a step before it is asked to stop; Ray carries it by value."""

    def work(config: dict[str, Any]) -> Any:
        import time

        import torch.distributed

        from stairstep.cluster.words import Words
        from stairstep.cluster.work import work as real
        from stairstep.training import Trainer

        update, words = Trainer._update, Words(config["group"])

        def patient(self: Trainer, at: int) -> None:
            limit = time.monotonic() + 200
            while torch.distributed.get_world_size() == 1 and at >= step and not words.asked_to_stop():
                if time.monotonic() > limit:
                    raise RuntimeError("nobody asked this group to stop")
                time.sleep(0.02)
            update(self, at)

        Trainer._update = patient  # type: ignore[method-assign]
        return real(config)

    return work
