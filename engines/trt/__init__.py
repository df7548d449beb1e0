"""TensorRT and TensorRT-RTX: one builder and one runner for both."""
