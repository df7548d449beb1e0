"""What a TensorRT builder says while it works: its log and its progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

_LOG = logging.getLogger(__name__)


@dataclass
class Log:
    """Lines of one build.

    Attributes:
        lines: Seconds since the start, severity and message of everything but the verbose.
        errors: The messages of severity ERROR and INTERNAL_ERROR.
        layers: The builder's own list of the engine's layers, which some releases tell.
    """

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)

    def add(self, severity: str, message: str) -> None:
        """Takes a message; verbose ones are dropped but for the layers of the engine."""
        if severity == "VERBOSE":
            if message.startswith("Layers:\n"):
                self.layers = [line for line in message.split("\n") if line.startswith("Name: ")]
            return
        self.lines.append(f"{time.perf_counter() - self._start:9.3f} {severity}: {message}")
        if "ERROR" in severity:
            self.errors.append(message)

    def last_error(self) -> str:
        """What went wrong most recently, as far as TensorRT said."""
        return self.errors[-1] if self.errors else "no reason given"

    def text(self) -> str:
        """The content of a ``build.log``."""
        return "".join(f"{line}\n" for line in self.lines)


def make_logger(trt: Any, log: Log) -> Any:
    """A TensorRT logger that writes to ``log``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            # The bindings ask for the base class by name; super() leaves the object unbound.
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.add(severity.name, msg)

    return Logger()


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """The builder's nested phases as one percentage; TensorRT may tell of them from any thread.

    Args:
        bar: Shows it; its total is 100.

    Attributes:
        interrupted: Whether the build shall end.
    """

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self._phases: dict[str, _Phase] = {}
        self.interrupted = False

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside another one or at the top."""
        self._phases[name] = _Phase(parent, max(1, steps))
        self._show(name)

    def step(self, name: str, step: int) -> None:
        """A step of a phase is done."""
        if name in self._phases:
            self._phases[name].done = step + 1
            self._show(name)

    def guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        """One of the above, for TensorRT, whose C++ knows nothing of Python's exceptions.

        An interrupt ends the build at its next step. A bar that cannot be shown (a terminal that
        was closed) is no reason to lose an engine.
        """
        try:
            call(*arguments)
        except KeyboardInterrupt:
            self.interrupted = True
        except Exception as error:
            _LOG.debug("progress not shown: %s", error)

    def finish(self, name: str) -> None:
        """A phase ends; it is a step of the one it lies in."""
        phase = self._phases.pop(name, None)
        if phase is not None and phase.parent is None:
            self._bar.update(100 - self._bar.n)

    def _show(self, name: str) -> None:
        phase = self._phases.get(name)
        share = 0.0
        while phase is not None:
            share = min(1.0, (phase.done + share) / phase.steps)
            phase = self._phases.get(phase.parent) if phase.parent is not None else None
        self._bar.set_postfix_str(name, refresh=False)
        # Phases may run again for another target; the bar never goes back.
        self._bar.update(max(0, int(100 * share) - self._bar.n))


def make_monitor(trt: Any, progress: Progress) -> Any:
    """A TensorRT progress monitor over ``progress``; an interrupt ends the build in good order."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.guarded(progress.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.guarded(progress.step, phase_name, step)
            return not progress.interrupted

        def phase_finish(self, phase_name: str) -> None:
            progress.guarded(progress.finish, phase_name)

    return Monitor()


def make_profiler(trt: Any, times: dict[str, list[float]]) -> Any:
    """A TensorRT profiler that adds each layer's milliseconds to ``times``."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    return Profiler()
