"""The Ray adapters: the only room of the library that imports ray. It places what `tasks/` computes."""

from .train import start_ray, train_on_ray, train_recipe

__all__ = ["start_ray", "train_on_ray", "train_recipe"]
