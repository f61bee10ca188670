"""What to do: recipes in YAML, their schema, and `load(name)`."""

from recipes.loader import RecipeError, load, names, parse
from recipes.schema import Recipe

__all__ = ["Recipe", "RecipeError", "load", "names", "parse"]
