"""Recipes: YAML, data only, one per task."""
