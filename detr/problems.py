"""What pydantic found wrong with a file, in terms of the file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# Pydantic's words for Python's kinds, in those of a file.
_WORDS = {
    **dict.fromkeys(("tuple_type", "list_type", "frozen_set_type"), "expected a list"),
    "path_type": "expected a path",
}
_SHAPES = {"model_type", "model_attributes_type", "dict_type", "union_tag_not_found"}


class Problem(NamedTuple):
    """The first thing that is wrong.

    Attributes:
        key: Where, as the file has it; empty for the whole file.
        unknown: There is no such key.
        message: Why, without the place.
        known: Keys there are in an unknown one's place.
        elsewhere: Which kinds of the part have an unknown key.
        no_mapping: There is a plain value where a mapping belongs.
    """

    key: tuple[str, ...]
    unknown: bool
    message: str
    known: tuple[str, ...] = ()
    elsewhere: str = ""
    no_mapping: bool = False

    def hint(self, *further: str) -> str:
        """``; did you mean ...?`` where a known key, or a further one, is near an unknown one."""
        near = difflib.get_close_matches(self.key[-1], [*self.known, *further], n=1)
        return f"; did you mean {near[0]!r}?" if near and not self.elsewhere else self.elsewhere


class _Place(NamedTuple):
    """Where an error is: its key, the model that has the key, and what else could stand there."""

    key: tuple[str, ...]
    owner: type[BaseModel] | None
    kinds: Mapping[str, type[BaseModel]]


def first_problem(error: ValidationError, model: type[BaseModel]) -> Problem:
    """The first problem to mend.

    A format of another release comes first, since all else follows from it; then a misspelt key,
    before the key that is missing because of it.

    Args:
        error: Of validating a file.
        model: What the file should have been.
    """

    def rank(one: Any) -> int:
        if one["loc"][-1:] == ("format",) and one["type"] == "literal_error":
            return 0
        return 1 if one["type"] == "extra_forbidden" else 2

    found = error.errors()
    first = min(found, key=rank)
    # Where a value may be one of several kinds, pydantic names functions among the keys.
    place = _place(model, [part for part in map(str, first["loc"]) if "()" not in part])
    if rank(first) == 0:
        message = f"{first['input']} is another release's; update detr-distillery"
        return Problem(place.key, False, message)
    if first["type"] == "extra_forbidden":
        known = tuple(place.owner.model_fields) if place.owner is not None else ()
        return Problem(place.key, True, "no such key", known, _elsewhere(place))
    if first["type"] == "union_tag_invalid":
        tag, kinds = str(first["ctx"]["tag"]), _kinds(_field(model, place.key))
        near = difflib.get_close_matches(tag, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(kinds)}"
        return Problem((*place.key, "kind"), False, f"no such kind {tag!r}; {hint}")
    if first["type"] in _SHAPES:
        kinds = _kinds(_field(model, place.key))
        hint = f" with a kind: {', '.join(kinds)}" if kinds else ""
        return Problem(place.key, False, f"expected a mapping{hint}", no_mapping=True)
    message = _WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    return Problem(place.key, False, message)


def problem_line(error: ValidationError, model: type[BaseModel]) -> str:
    """Place and reason of :func:`first_problem` in one line."""
    problem = first_problem(error, model)
    return f"{'.'.join(problem.key) or 'file'}: {problem.message}{problem.elsewhere}"


def _elsewhere(place: _Place) -> str:
    """Which other kinds have an unknown key."""
    others = [kind for kind, m in place.kinds.items() if place.key[-1] in m.model_fields]
    own = next((kind for kind, m in place.kinds.items() if m is place.owner), None)
    if not others or own is None:
        return ""
    told = " and ".join(part for part in (", ".join(others[:-1]), others[-1]) if part)
    return f"; kind: {own} has none, {told} have"


def _place(model: type[BaseModel], loc: list[str]) -> _Place:
    """The place of an error; between keys, pydantic names the kinds of unions."""
    key: list[str] = []
    owner: type[BaseModel] | None = model
    inner: type[BaseModel] | None = model
    kinds: Mapping[str, type[BaseModel]] = {}
    further: Mapping[str, type[BaseModel]] = {}
    for part in loc:
        if part in further and inner is None:
            inner = further[part]
            continue
        owner, kinds = inner, further
        key.append(part)
        field = owner.model_fields.get(part) if owner is not None else None
        further = _kinds(field)
        inner = None if further else next(_models(field), None)
    return _Place(tuple(key), owner, kinds)


def _field(model: type[BaseModel], key: tuple[str, ...]) -> FieldInfo | None:
    """The field at a key above which no kinds are chosen."""
    inner: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in key:
        field = inner.model_fields.get(part) if inner is not None else None
        inner = next(_models(field), None)
    return field


def _kinds(field: FieldInfo | None) -> dict[str, type[BaseModel]]:
    """The members of a discriminated union by kind; none for any other field."""
    if field is None or field.discriminator is None:
        return {}
    if not isinstance(field.discriminator, str):  # told apart by a function, named by their class
        return {m.__name__: m for m in _models(field)}
    return {str(m.model_fields["kind"].default): m for m in _models(field)}


def _models(field: FieldInfo | None) -> Iterator[type[BaseModel]]:
    """Models among a field's types."""
    kind = None if field is None else field.annotation
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            yield one
