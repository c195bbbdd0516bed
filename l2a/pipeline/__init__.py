"""Joins the stages into whole jobs: distillation, augmenting a file, and training policies."""
