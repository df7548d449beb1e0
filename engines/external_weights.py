"""An ONNX file with its weights beside it, as files over protobuf's 2 GiB have to be."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

# Smaller ones, such as the shapes of a Reshape, stay where a reader of the graph alone finds them.
_LEAST_BYTES = 1024


def save_with_weights(model: onnx.ModelProto, path: Path) -> str:
    """Writes a graph and, in a file beside it, its weights; the model's own are given up.

    ``onnx.save_model`` does the same but looks for the file of the weights in the working
    directory, and refuses where another model's lies there.

    Args:
        model: Its weights are ``raw_data``.
        path: The graph's file, in a folder that holds no weights yet.

    Returns:
        The name of the weights' file.

    Raises:
        OSError: The folder is not writable or full.
    """
    location = f"{path.name}.data"
    for tensor in model.graph.initializer:
        if tensor.HasField("raw_data") and len(tensor.raw_data) >= _LEAST_BYTES:
            set_external_data(tensor, location)
    onnx.save_model(model, str(path))
    return location
