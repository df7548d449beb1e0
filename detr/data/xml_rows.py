"""XML files as trees whose elements know their line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from detr.errors import UserError


@dataclass
class Element:
    """One element.

    Attributes:
        tag: Its name.
        line: Where it begins, from 1.
        text: Characters directly in it.
        children: Elements directly in it.
    """

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> Iterator[Element]:
        """Children of a name."""
        return (child for child in self.children if child.tag == tag)

    def find(self, path: str) -> Element | None:
        """The first element on a path of names, ``source/database``."""
        found: Element | None = self
        for tag in path.split("/"):
            found = next(found.all(tag), None) if found is not None else None
        return found


def read_xml(path: Path) -> Element:
    """The outermost element of a file.

    Raises:
        UserError: ``label-missing``, ``label-unreadable`` or ``xml-syntax``.
    """
    root = Element("", 0)
    open_elements = [root]
    parser = expat.ParserCreate()

    def start(tag: str, _: dict[str, str]) -> None:
        element = Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end(_: str) -> None:
        open_elements.pop()

    def characters(text: str) -> None:
        open_elements[-1].text += text

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = characters
    try:
        parser.Parse(path.read_bytes(), True)
    except FileNotFoundError as error:
        raise UserError("label-missing", f"{path}: no such label file") from error
    except OSError as error:
        raise UserError("label-unreadable", f"{path}: {error.strerror or error}") from error
    except (expat.ExpatError, ValueError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError("xml-syntax", f"{path}:{line}: not XML: {error}") from error
    return root.children[0]
