"""Hierarchical Semantic Alignment, CsMl (arXiv 2012.02733)."""
