"""FAME: foreground-background merging for video contrastive learning."""
