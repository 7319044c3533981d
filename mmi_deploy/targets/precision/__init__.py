"""Precision of a target: recipes as data, and the rewrite of a portable graph by a recipe."""

from mmi_deploy.targets.precision.moments import Moments
from mmi_deploy.targets.precision.ranges import Ranges, measure_ranges
from mmi_deploy.targets.precision.recipes import RECIPES, Recipe, check_possible, recipe
from mmi_deploy.targets.precision.rewrite import rewrite

__all__ = [
    "RECIPES",
    "Moments",
    "Ranges",
    "Recipe",
    "check_possible",
    "measure_ranges",
    "recipe",
    "rewrite",
]
