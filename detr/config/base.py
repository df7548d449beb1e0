"""What every config is built on: strictness, changes key by key, and stacks of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

S = TypeVar("S", bound="Strict")
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Base of every config: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self: S, **changes: Any) -> S:
        """The same with other values, validated.

        Mappings change what they name and leave the rest; a mapping that names another ``kind``, or
        a config, replaces the whole part, for each kind has options of its own.

        Args:
            changes: By key; ``**{"encoder.layers": 3}`` is ``encoder={"layers": 3}``.

        Raises:
            pydantic.ValidationError: For what :class:`Strict` and the class refuse.
        """
        values = self.model_dump()
        for key, value in changes.items():
            for part in reversed(key.split(".")):
                value = {part: value}
            values = merged(values, value)
        return self.model_validate(values)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes over a base, mapping by mapping; another ``kind``, or a config, replaces it."""
    if "kind" in changes and changes["kind"] != base.get("kind", changes["kind"]):
        return {key: _plain(value) for key, value in changes.items()}
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = merged(below, value)
        else:
            result[key] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    """A value with configs as mappings."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


class Part(Strict):
    """A part of which there are several kinds, told apart by ``kind``; each sets its own."""

    kind: str


class LayerStack(Strict):
    """Transformer layers of one kind.

    Attributes:
        layers: Their number.
        ffn: Hidden width of their feed-forward networks.
        activation: Within them; ``prelu`` learns one slope per network (DAB-DETR), RT-DETR's
            encoder has ``gelu``.
    """

    layers: Positive = 6
    ffn: Positive = 1024
    activation: Literal["relu", "prelu", "gelu"] = "relu"


class ClassMap(Strict):
    """The one mapping between class indices, names and the data set's category ids.

    Attributes:
        names: Class name of each index.
        category_ids: COCO category id of each index (1-based positions for KITTI).
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)
