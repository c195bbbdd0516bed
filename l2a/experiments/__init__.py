"""Grids of cells that show what a method is worth: run, resumed, compared and reported."""
