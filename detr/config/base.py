"""What every config is built on: strictness, changes key by key, and stacks of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from detr.points import Points, joined_points

S = TypeVar("S", bound="Strict")

# Upper ends are far beyond any detector: a slip of the finger is told where it is, and not by the
# allocator.
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


_MOST_POINTS = 64


def _points(value: Any) -> Points:
    """P, or P of each level; equal ones are one number, since the samples are laid out by it."""
    counts = value if isinstance(value, list | tuple) else [value]
    for count in counts:
        known = isinstance(count, int) and not isinstance(count, bool)
        if not known or not 1 <= count <= _MOST_POINTS:
            raise ValueError(f"{count!r} is no whole number from 1 to {_MOST_POINTS}")
    if not counts:
        raise ValueError("no number of points")
    return joined_points(counts)


# Of sampling points, of every level alike or of each.
SamplingPoints = Annotated[Points, BeforeValidator(_points)]


def _some_word(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("is empty" if not value else "has a NUL in it")
    return value


# A path, or what a program calls something.
Word = Annotated[str, AfterValidator(_some_word)]


class Strict(BaseModel):
    """Base of every config: frozen, a misspelt key is an error, and numbers are finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, content: Any) -> Any:
        """``steps: true`` would be one step."""
        if isinstance(content, Mapping):
            for name, field in cls.model_fields.items():
                kinds = {field.annotation, *get_args(field.annotation)}
                if isinstance(content.get(name), bool) and kinds & {int, float}:
                    raise ValueError(f"{name} is {str(content[name]).lower()}, not a number")
        return content

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


class Record(Strict):
    """What a program measured and wrote down: there a number may be infinite."""

    model_config = ConfigDict(allow_inf_nan=True)


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


def usual_kind(kind: str) -> BeforeValidator:
    """For a part that once had one kind alone: without a ``kind`` it is still that one."""

    def named(value: Any) -> Any:
        if isinstance(value, Mapping) and "kind" not in value:
            return {"kind": kind, **value}
        return value

    return BeforeValidator(named)


class LayerStack(Strict):
    """Transformer layers of one kind.

    Attributes:
        layers: Their number.
        ffn: Hidden width of their feed-forward networks.
        activation: Within them; ``prelu`` learns one slope per network (DAB-DETR), RT-DETR's
            encoder has ``gelu``, DEIM's decoder ``silu``, DEIMv2's ``swiglu``: SiLU of one linear
            map times another.
    """

    layers: Annotated[int, Field(ge=1, le=100)] = 6
    ffn: Annotated[int, Field(ge=1, le=65536)] = 1024
    activation: Literal["relu", "prelu", "gelu", "silu", "swiglu"] = "relu"


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
