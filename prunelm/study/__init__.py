"""Grids of pruned models, the demo among them, and the reports made of them."""
