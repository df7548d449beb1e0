"""The stages in their order, each with the time one of its parts may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tools.gpu_check.part import Parts, Setting


@dataclass(frozen=True)
class Stage:
    """Parts that prove one thing.

    Attributes:
        place: ``module:function``, imported in the process that runs it: what one stage needs and
            this machine lacks must not keep the others from running.
        seconds: That one part may take.
    """

    place: str
    seconds: float

    def parts(self, setting: Setting) -> Parts:
        """Its parts by name."""
        module, function = self.place.split(":")
        make: Callable[[Setting], Parts] = getattr(
            import_module(f"tools.gpu_check.{module}"), function
        )
        return make(setting)


STAGES: dict[str, Stage] = {
    "correctness": Stage("correctness:correctness", 120),
    "plugin": Stage("plugin:plugin", 60),
    "runner": Stage("runner:runner", 60),
    "timing": Stage("timing:timing", 180),
    "sanitizer": Stage("sanitizer:sanitizer", 120),
    "training": Stage("training:training", 300),
    "export": Stage("artifacts:export", 600),
    "onnxruntime-cuda": Stage("artifacts:onnxruntime_cuda", 600),
    "tensorrt-rtx": Stage("artifacts:tensorrt_rtx", 1800),
    "tensorrt": Stage("artifacts:tensorrt", 1800),
    "report": Stage("artifacts:report", 1800),
}


def planned(names: list[str], setting: Setting) -> list[tuple[str, str | None, Any]]:
    """Stage, part and, of a stage whose parts cannot be listed, the reason instead of a part."""
    plan: list[tuple[str, str | None, Any]] = []
    for name in names:
        try:
            plan += [(name, part, None) for part in STAGES[name].parts(setting)]
        except ImportError as error:
            plan.append((name, None, f"{error.name or error} is not installed"))
    return plan
