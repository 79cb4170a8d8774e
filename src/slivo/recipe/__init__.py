"""Recipes: what to do to a network, written down, checked, and run in a folder."""

from slivo.recipe.compression import Target, compress
from slivo.recipe.load import Loaded, json_schema, load
from slivo.recipe.run import Result, run
from slivo.recipe.shipped import shipped
from slivo.recipe.watch import Watch

__all__ = ["Loaded", "Result", "Target", "Watch", "compress", "json_schema", "load", "run", "shipped"]
