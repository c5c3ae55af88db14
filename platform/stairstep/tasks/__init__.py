"""What a run does: recipes are composed here, and data, tiles, models, objectives and evaluations are put together.

Only the recipe is imported here, so that one can be read, shown and checked before the model libraries are loaded.
"""

from .recipe import ClusterSettings, Recipe, RetrievalTaskSettings, load_recipe, ray_address, recipe_digest

__all__ = ["ClusterSettings", "Recipe", "RetrievalTaskSettings", "load_recipe", "ray_address", "recipe_digest"]
