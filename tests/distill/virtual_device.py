"""A device that is not there: tensors that say they are on it, and count what it is waited for.

Each tensor holds one on the CPU and computes with it. What a GPU refuses is refused (tensors of two
devices in one operation, a generator of the CPU for numbers on the device), and every place at
which Python waits for a GPU is noted:

* ``read``: a value comes to the CPU (``item``, ``bool``, ``tolist``, ``cpu``);
* ``upload``: a copy from the CPU that is not ``non_blocking``, as ``torch.tensor(..., device=)`` is
  and an index that is a list or on the CPU;
* ``shape``: the result's size depends on values (``nonzero``, an index of bools, ``unique``).

torch's device type ``lazy`` stands for the GPU: this torch has no backend for it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)
ROOT = Path(__file__).resolve().parents[2]
_AT = torch.ops.aten
# Answers whose size only the values know.
_SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique", "bincount")
_INDEXED = ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index")
# Operations that take a number from the CPU's memory for one on the device.
_NO_SCALARS = ("cat", "stack", "index_select", "gather", "scatter", "scatter_", "scatter_add_")


class MixedDevices(RuntimeError):
    """What a GPU would have refused."""


class OnDevice(Tensor):
    """A tensor on the device.

    Attributes:
        inner: Its content.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Waits:
    """Notes of waiting: kind, and the line of ours that asked for it."""

    def __init__(self) -> None:
        self.places: Counter[tuple[str, str]] = Counter()

    def note(self, kind: str) -> None:
        place = "?"
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and "tests" not in path.parts:
                place = f"{path.relative_to(ROOT)}:{frame.lineno} {frame.line}"
                break
        self.places[kind, place] += 1

    def counts(self) -> dict[str, int]:
        """How often, by kind."""
        found: Counter[str] = Counter()
        for (kind, _), count in self.places.items():
            found[kind] += count
        return dict(found)

    def text(self) -> str:
        """A line for each place."""
        return "\n".join(f"{n} x {kind}: {place}" for (kind, place), n in self.places.items())


_waits = Waits()


def _here(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``to``: from or to the device, or within one."""
    source, wanted = args[0], kwargs.pop("device", None)
    waits = not kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    made = func(_inner(source), *args[1:], **kwargs)
    stays = isinstance(source, OnDevice)
    if not (stays if wanted is None else _here(wanted)):
        if stays:
            _waits.note("read")
        return made
    if not stays and waits:
        _waits.note("upload")
    return OnDevice(made.clone() if made is _inner(source) else made)


def _check(name: str, func: Any, args: Any, flat: list[Any], kwargs: dict[str, Any]) -> None:
    """Refuses what a GPU refuses, and notes what it is waited for."""
    ours = [x for x in flat if isinstance(x, OnDevice)]
    others = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    generator = kwargs.get("generator")
    there = bool(ours) or _here(kwargs.get("device"))
    if there and generator is not None and generator.device.type == "cpu":
        raise MixedDevices(f"{name}: a generator of the CPU for numbers on the device")
    if not ours:
        return
    if name in _INDEXED:
        index = [x for x in args[1] if isinstance(x, Tensor)]
        bools = any(x.dtype in (torch.bool, torch.uint8) for x in index)
        # One number for all that a mask names is written without counting them.
        filled = name != "index" and len(index) == 1 and _inner(args[2]).numel() == 1
        if bools and not filled:
            _waits.note("shape")
        if not isinstance(args[0], OnDevice):
            raise MixedDevices(f"{name}: the device's index into the CPU's tensor")
        for x in index:
            if not isinstance(x, OnDevice):
                _waits.note("upload")
    elif any(x.ndim or name in _NO_SCALARS for x in others):
        shapes = [(type(x) is OnDevice, tuple(x.shape)) for x in flat if isinstance(x, Tensor)]
        raise MixedDevices(f"{name}: tensors of two devices {shapes}")
    if name.startswith(_SIZED_BY_VALUES):
        _waits.note("shape")
    sized = kwargs.get("output_size") is not None or not isinstance(args[-1], Tensor)
    if name == "repeat_interleave" and not sized:
        _waits.note("shape")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    if name == "_local_scalar_dense" and isinstance(args[0], OnDevice):
        _waits.note("read")
        return func(args[0].inner)
    if name == "_to_copy":
        return _copied(func, args, dict(kwargs))
    if name == "copy_":
        target, source = args[:2]
        if isinstance(source, OnDevice) and not isinstance(target, OnDevice):
            _waits.note("read")
        if isinstance(target, OnDevice) and not isinstance(source, OnDevice):
            _waits.note("upload")
        func(_inner(target), _inner(source))
        return target
    flat, _ = tree_flatten((args, kwargs))
    _check(name, func, args, flat, kwargs)
    known = {id(x.inner): x for x in flat if isinstance(x, OnDevice)}
    wanted = kwargs.get("device")
    there = bool(known) if wanted is None else _here(wanted)
    given = {key: _inner(x) for key, x in tree_map(_inner, kwargs).items()}
    if _here(wanted):
        given["device"] = torch.device("cpu")
    given.pop("pin_memory", None)
    out = func(*tree_map(_inner, args), **given)
    if not there:
        return out

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnDevice):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(placed, out)


class _Dispatched(TorchDispatchMode):
    """Sees what makes tensors on the device out of none that are there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Called(TorchFunctionMode):
    """Sees what torch does before it dispatches: tensors made of numbers, and lists of tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _here(kwargs.get("device")):
            del kwargs["device"]
            _waits.note("upload")
            return OnDevice(func(*args, **kwargs))
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            _waits.note("upload")
            kwargs.setdefault("dtype", args[0].dtype)
            return OnDevice(torch.tensor(args[1], **kwargs))
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            _waits.note("read")
            return args[0].inner.tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnDevice):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            made = tuple(torch.tensor(x) if isinstance(x, list) else x for x in index)
            args = (args[0], made if isinstance(args[1], tuple) else made[0], *args[2:])
        return func(*args, **kwargs)


@contextmanager
def watched() -> Iterator[Waits]:
    """Within it the device is there; what it was waited for since."""
    global _waits
    _waits = Waits()
    with _Dispatched(), _Called():
        yield _waits
