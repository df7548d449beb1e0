"""A model's own files in a Hugging Face folder, which may hold others beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from detr.errors import UserError
from detr.models.tensors import read_checkpoint

# In the order in which the transformers library looks for them; an index names the files of a model
# that is cut into several.
_INDEX = ".index.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors" + _INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin" + _INDEX,
)


def read_document(path: Path) -> dict[str, Any]:
    """A JSON table of a folder.

    Raises:
        UserError: ``weights-source`` where there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("weights-source", f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError("weights-source", f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError("weights-source", f"{path}: not a table")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in a folder; other files of weights in it are not read.

    Raises:
        UserError: ``weights-source`` where the folder has none of :data:`WEIGHTS` or an index does
            not fit its files, and what :func:`detr.models.tensors.read_checkpoint` raises.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            "weights-source", f"{folder}: no {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}"
        )
    if not file.name.endswith(_INDEX):
        return read_checkpoint(file).tensors
    table = read_document(file).get("weight_map")
    if not isinstance(table, dict) or not all(
        isinstance(part, str) and part == Path(part).name for part in table.values()
    ):
        raise UserError(
            "weights-source", f"{file}: no weight_map of tensors to files of the folder"
        )
    tensors: dict[str, Tensor] = {}
    for part in sorted(set(table.values())):
        tensors |= read_checkpoint(folder / part).tensors
    if absent := sorted(table.keys() - tensors.keys()):
        raise UserError(
            "weights-source",
            f"{file}: {absent[0]} is not in {table[absent[0]]} ({len(absent)} such tensors)",
        )
    return {name: tensors[name] for name in table}
