"""MRA, Mask-Reconstruct Augmentation (Masked Autoencoders are Robust Data Augmentors, arXiv 2206.04846)."""
