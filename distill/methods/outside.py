"""Methods that live outside the package: ``module:Class`` in a recipe.

The module is looked for where Python looks, and in the current folder after that, so that nothing
there can stand in for an installed package. Naming a module runs its code.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from detr.errors import UserError
from distill.methods.base import Method

SEPARATOR = ":"


def load_method(place: str) -> type[Method[Any]]:
    """The method class at ``module:Class``.

    Raises:
        UserError: ``method-module`` where there is no such module or its code fails,
            ``method-class`` where it has no such class, or one that is no complete method.
    """
    module_name, _, attribute = place.partition(SEPARATOR)
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(
            "method-module", f"methods: {place!r} is not module:Class, as in my_package.mine:Mine"
        )
    module = _imported(place, module_name)
    kind = getattr(module, attribute, None)
    if kind is None:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            "method-class", f"methods: {place}: {_file(module)} has no {attribute}{hint}"
        )
    if (fault := _fault(kind)) is not None:
        raise UserError("method-class", f"methods: {place}: {attribute} in {_file(module)} {fault}")
    method: type[Method[Any]] = kind
    return method


def _imported(place: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                "method-module",
                f"methods: {place}: there is no module {error.name}, neither in {os.getcwd()} nor "
                "on PYTHONPATH nor installed",
            ) from error
        raise _broken(place, error) from error
    except Exception as error:  # whatever the module does while it is imported
        raise _broken(place, error) from error


def _broken(place: str, error: Exception) -> UserError:
    """Where and with what a module fails."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file, line = last.filename, last.lineno
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, SyntaxError):
        file, line, text = error.filename or file, error.lineno, error.msg
    return UserError(
        "method-module", f"methods: {place}: {file}:{line}: {type(error).__name__}: {text}"
    )


def _fault(kind: object) -> str | None:
    """Why something is no method a recipe can name, or ``None``."""
    if not inspect.isclass(kind) or not issubclass(kind, Method):
        return "is no class derived from distill.methods.Method"
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        return f"does not define {', '.join(missing)}"
    if not getattr(kind, "name", ""):
        return 'has no name: name = "...", the first part of its losses\' keys'
    return None


def _file(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)
