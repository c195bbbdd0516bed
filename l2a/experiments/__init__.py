"""Grids of cells that compare methods: run, resumed, compared and reported."""
