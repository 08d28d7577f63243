"""Training methods: a classifier of the base classes, or episodes; either with the regulariser on top."""
