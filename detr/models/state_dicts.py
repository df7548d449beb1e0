"""Which tensors of a training's file are the model, trained or averaged, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from detr.errors import UserError

_TRAINED = ("model", "state_dict", "model_state_dict")
# DINO and its relatives, mmengine, DETA, timm, detrex, RT-DETR.
_AVERAGED = ("ema_model", "ema_state_dict", "model_ema", "state_dict_ema", "ema_state", "ema")
# Wrappers of a state dict and of its names: averaging, several processes, Lightning, compilation.
_INNER = ("module", "model", "state_dict")
_PREFIXES = ("module.", "model.", "_orig_mod.")


class StateDict(NamedTuple):
    """One of a file's state dicts.

    Attributes:
        tensors: By name.
        note: What was chosen and why, for the person who reads the file; may be empty.
        left: The key of the state dict that was not; empty where there is one only.
    """

    tensors: dict[str, Tensor]
    note: str = ""
    left: str = ""


def state_dict(content: Mapping[str, Any], place: str, averaged: bool | None) -> StateDict:
    """The tensors of a training's file.

    Args:
        content: Of the file.
        place: The file, for messages.
        averaged: The running average of the weights (EMA) and not the weights themselves; ``None``
            for what the file has in its main place.

    Raises:
        UserError: ``checkpoint-ema`` where the file does not hold what is asked for.
    """
    found = {
        key: tensors
        for key in (*_TRAINED, *_AVERAGED)
        if isinstance(content.get(key), Mapping) and (tensors := _tensors(content[key]))
    }
    main = next((key for key in _TRAINED if key in found), None)
    other = next((key for key in _AVERAGED if key in found), None)
    if main is not None and other is not None and _exchanged(content):
        # mmengine puts the average where a detector is read from, and the weights beside it.
        found[other] = {n: x for n, x in found[other].items() if n != "steps"}
        return _of_both(found, main, average=main, trained=other, averaged=averaged)
    if main is not None and other is not None:
        return _of_both(found, main, average=other, trained=main, averaged=averaged)
    only = main if other is None else other
    if averaged is not None and averaged != (other is not None):
        kind = "averaged weights (EMA)" if averaged else "weights that are not averaged"
        raise UserError("checkpoint-ema", f"{place}: holds no {kind}")
    if only is None:
        return StateDict(_tensors(content))
    note = "" if other is None else f"{other}: averaged weights (EMA), the only ones here"
    return StateDict(found[only], note)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefixes that wrappers put before every name."""
    named = dict(tensors)
    while prefix := next((p for p in _PREFIXES if named and all(_has(n, p) for n in named)), None):
        named = {name.removeprefix(prefix): x for name, x in named.items()}
    return named


def _of_both(
    found: Mapping[str, dict[str, Tensor]],
    main: str,
    *,
    average: str,
    trained: str,
    averaged: bool | None,
) -> StateDict:
    chosen = main if averaged is None else average if averaged else trained
    kinds = {average: "averaged weights (EMA)", trained: "weights as trained"}
    left = trained if chosen == average else average
    option = "--ema" if left == average else "--no-ema"
    note = f"{chosen}: {kinds[chosen]}; {option} takes the {kinds[left]} of {left}"
    return StateDict(found[chosen], note, left)


def _exchanged(content: Mapping[str, Any]) -> bool:
    """Whether ``state_dict`` is the average: mmengine's hook exchanges the two before it saves."""
    meta = content.get("meta")
    told = isinstance(meta, Mapping) and "mmengine_version" in meta
    return (told or "message_hub" in content) and "ema_state_dict" in content


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict that wrappers may enclose."""
    inner = next((key for key in _INNER if isinstance(content.get(key), Mapping)), None)
    if inner is not None:
        return _tensors(content[inner])
    return {str(name): x for name, x in content.items() if isinstance(x, Tensor)}


def _has(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name != prefix
