"""What a part of a stage is, and how its process tells what it found."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Device = Literal["cpu", "cuda"]


class Skipped(Exception):
    """A part whose runtime is not installed or does not know this GPU."""


@dataclass(frozen=True)
class Setting:
    """What parts are run on.

    Attributes:
        device: ``cpu`` runs the same lines without a GPU, where there are any.
        bundles: To build engines of.
    """

    device: Device = "cuda"
    bundles: tuple[Path, ...] = ()


# A stage's parts by name, each a function without arguments that runs in a process of its own.
Parts = dict[str, Callable[[], Any]]


@dataclass
class Cases:
    """Cases of one part: one that fails does not keep the others from being tried.

    Each is told as it ends, so that a crash or a timeout loses only the one it happened in.
    """

    failed: list[str] = field(default_factory=list)
    count: int = 0

    def run(
        self, name: str, case: Callable[[], Mapping[str, float]], allowed: float | None = None
    ) -> None:
        """Runs a case.

        Args:
            name: Of the case.
            case: Answers with figures by name.
            allowed: The largest any of them may be; ``None`` where they are not errors.
        """
        self.count += 1
        told: dict[str, Any] = {"case": name}
        try:
            figures = dict(case())
            told |= figures
            if allowed is not None and not all(figure <= allowed for figure in figures.values()):
                told["failed"] = f"more than {allowed} is not allowed"
        except Skipped as reason:
            told["skipped"] = str(reason)
        except Exception as error:  # torch's, CUDA's and our own share no base
            told["failed"] = f"{type(error).__name__}: {last_line(str(error))}"
        if "failed" in told:
            self.failed.append(f"{name}: {told['failed']}")
        print(json.dumps(told), flush=True)

    def finish(self) -> str:
        """How many passed.

        Raises:
            RuntimeError: One or more failed.
        """
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} of {self.count} failed; {self.failed[0]}")
        return f"{self.count} cases"


def answer(part: Callable[[], Any]) -> dict[str, Any]:
    """Runs a part: what its process says last."""
    try:
        result = part()
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # the runtimes' own exceptions share no base
        trace = traceback.format_exc().splitlines()[-12:]
        reason_ = last_line(str(error)) or type(error).__name__
        return {"status": "failed", "reason": reason_, "traceback": trace}
    if isinstance(result, dict) and "failed" in result:
        return {"status": "failed", "reason": result["failed"], "result": result}
    return {"status": "passed", "result": result}


def last_line(text: str, most: int = 500) -> str:
    """The last line of a text that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""
