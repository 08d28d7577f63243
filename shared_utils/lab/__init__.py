"""What measures, draws and generates: nothing here is imported by a training step."""
