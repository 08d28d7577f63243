"""BINGO: bag of instances aggregation boosts self-supervised distillation (arXiv 2107.01691)."""
