"""Recipes as text: YAML over its base, with the place of every key for messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from detr.cli_support import pairs
from detr.config import merged
from detr.errors import UserError
from detr.yaml_loader import Loader

# File and line, or override, of every key.
Places = dict[tuple[str, ...], str]

# Of keys in a recipe: far more than there are.
_DEEPEST, _MOST_KEYS = 50, 10_000


def read_recipe(
    path: Path, overrides: Sequence[str], find: Callable[[str], Path]
) -> tuple[dict[str, Any], Places]:
    """A recipe's content over that of its bases, with the overrides, and where each key stands.

    Args:
        path: YAML file.
        overrides: ``a.b=value`` with the value in YAML.
        find: The file of a base given by path or shipped name.

    Raises:
        UserError: ``recipe-missing``, ``recipe-yaml``, ``recipe-key`` or ``recipe-value``.
    """
    places: Places = {}
    content = _read(path, places, (), find)
    for key, text in pairs(overrides, "--set").items():
        _override(content, key, text, places)
    return content, places


def place_of(key: tuple[str, ...], places: Places, path: Path) -> str:
    """Where a key stands, or what it is to be in."""
    while key and key not in places:
        key = key[:-1]
    return places.get(key, str(path))


def is_file(path: Path) -> bool:
    """Whether there is such a file; what is longer than any name can be is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read(
    path: Path, places: Places, above: tuple[Path, ...], find: Callable[[str], Path]
) -> dict[str, Any]:
    """A file's content over that of its base; ``above`` are the files that build on it."""
    if path in above:
        raise UserError("recipe-value", f"{path}: base: the recipe builds on itself")
    try:
        node = yaml.compose(path.read_text(), Loader)
    except OSError as error:
        raise UserError("recipe-missing", f"{path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError("recipe-yaml", f"{path}: nested too deep for a recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a text file"
        raise UserError("recipe-yaml", f"{path}{line}: {problem}") from error
    here: Places = {}
    content = _build(node, (), here, path) if node is not None else {}
    if not isinstance(content, dict):
        raise UserError("recipe-yaml", f"{path}:1: a recipe is a mapping of keys to values")
    if (base := content.pop("base", None)) is not None:
        if not isinstance(base, str):
            raise UserError("recipe-value", f"{path}: base: {base!r} is no name or path")
        beside = path.parent / f"{base}.yaml"
        found = beside if is_file(beside) else find(base)
        content = merged(_read(found, places, (*above, path), find), content)
    places.update(here)
    return content


def _build(node: yaml.Node, key: tuple[str, ...], places: Places, path: Path) -> Any:
    """A node's value; notes the file and line of every key on the way."""
    if len(key) > _DEEPEST or len(places) > _MOST_KEYS:  # an alias of itself, or of many others
        raise UserError("recipe-yaml", f"{path}: nested too deep or too large for a recipe")
    places[key] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        result = {}
        for key_node, value in node.value:
            name = str(key_node.value)
            here = f"{path}:{key_node.start_mark.line + 1}"
            if name in result:
                raise UserError("recipe-key", f"{here}: key {name!r} appears twice")
            result[name] = _build(value, (*key, name), places, path)
            inner = (*key, name)
            places[inner] = here
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(v, (*key, str(i)), places, path) for i, v in enumerate(node.value)]
    return _scalar(node, places[key])


def _scalar(node: yaml.Node, where: str) -> Any:
    loader = Loader("")
    try:
        return loader.construct_object(node, deep=True)
    # A date of no calendar and a number of no end are ValueErrors of Python.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError("recipe-yaml", f"{where}: {_one_line(error)}") from error
    finally:
        loader.dispose()


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _override(content: dict[str, Any], key: str, text: str, places: Places) -> None:
    """Sets ``a.b`` in a nested structure; numbers index lists."""
    here = f"--set {key}={text}"
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError("recipe-yaml", f"{here}: the value is not YAML") from error
    *parents, last = key.split(".")
    at: Any = content
    end = 0
    while end < len(parents):
        part, end = parents[end], end + 1
        if isinstance(at, list):
            index = _index(at, part, here)
            if isinstance(at[index], str):  # a method by its bare name
                at[index] = {at[index]: {}}
            at = at[index]
        elif not isinstance(at, dict):
            raise UserError("recipe-key", f"{here}: there is nothing below {part!r}")
        else:
            # The name of a method outside the package has dots of its own.
            while part not in at and any(name.startswith(f"{part}.") for name in map(str, at)):
                if end == len(parents):
                    raise UserError("recipe-key", f"{here}: there is nothing at {part!r}")
                part, end = f"{part}.{parents[end]}", end + 1
            if not isinstance(at.get(part), dict | list):
                at[part] = {}
            at = at[part]
    if isinstance(at, list):
        at[_index(at, last, here)] = value
    else:
        at[last] = value
    whole = tuple(key.split("."))
    # What a file says below it is no longer there.
    for below in [one for one in places if one[: len(whole)] == whole]:
        del places[below]
    for end in range(1, len(whole) + 1):
        places[whole[:end]] = here


def _index(items: list[Any], part: str, here: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError("recipe-key", f"{here}: {part!r} is not a place in a list of {len(items)}")
    return int(part)
