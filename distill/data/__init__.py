"""Training batches and how their images vary."""
