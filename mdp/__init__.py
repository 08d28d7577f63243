"""Multi-dataset Pretraining: A Unified Model for Semantic Segmentation (arXiv 2106.04121)."""
