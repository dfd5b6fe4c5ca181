"""`osdn theory`: the statements of docs/math.md as small float64 experiments, expected beside measured."""
