"""Work done ahead in a thread, a few items before they are asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 0.1  # seconds between looks at whether anyone still wants the rest


@dataclass(frozen=True)
class _End:
    """Behind the last item; with what ended the iterable early."""

    error: BaseException | None = None


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """Goes through an iterable in a thread of its own, which waits when it is far enough ahead.

    So reading and decoding happen while an engine computes, and no more than ``depth`` items wait
    in memory. An exception of the iterable comes out where its item would have.

    Args:
        items: What to go through; only the thread touches it.
        depth: How many items may wait.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | _End) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            put(_End(error))
        else:
            put(_End())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()
