"""SsCL: semi-supervised contrastive learning with similarity co-calibration (paper 2105.07387)."""
