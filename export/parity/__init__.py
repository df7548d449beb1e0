"""The gate: an engine's detections against the torch model's."""
