"""K-Shot Contrastive Learning of Visual Features with Multiple Instance Augmentations (2007.13310)."""
