"""From a checkpoint to a bundle: ONNX with one node per attention, and proof that it is right."""
