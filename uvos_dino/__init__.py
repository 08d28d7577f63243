"""Betrayed by Attention: self-supervised video object segmentation from DINO attention (arXiv 2311.17893)."""
