"""From a torch module to a graph of opset 17."""
