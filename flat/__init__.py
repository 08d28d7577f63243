"""FLAT: few-shot learning with an autoencoding-transformation regulariser (paper 1912.12674, reconstructed)."""
