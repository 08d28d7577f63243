"""SaGe: semantic-aware generation for self-supervised visual representation learning (arXiv 2111.13163)."""
