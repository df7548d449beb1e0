"""The TensorRT plugin as far as it goes without TensorRT, against a stand-in for its Python API."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from typing_extensions import TypeAliasType  # comes with pydantic

from detr.errors import UserError
from engines import msda_plugin
from engines.msda_function import make_node

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
FLAT = np.array([51, 167, 26, 84, 13, 42, 7, 21], np.int32)


class Expression:
    """A symbolic number, as text."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __mul__(self, other: Expression) -> Expression:
        return Expression(f"{self.text}*{other.text}")


class TensorDesc:
    def __init__(self, dtype: str, names: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.shape_expr: Any = tuple(Expression(name) for name in names)

    def like(self) -> TensorDesc:
        copy = TensorDesc(self.dtype, "", self.shape)
        copy.shape_expr = self.shape_expr
        return copy


class KernelLaunchParams:
    grid_x: Any = 1
    block_x: Any = 1


class SymIntExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class ShapeExprs:
    @staticmethod
    def from_tuple(expressions: tuple[Expression, ...]) -> tuple[str, ...]:
        return tuple(expression.text for expression in expressions)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The plugin's three functions, as TensorRT gets them."""
    functions: dict[str, Any] = {}

    def taker(kind: str) -> Any:
        def decorator(plugin_id: str) -> Any:
            unequal = {"detr::MSDeformAttn": "", "detr_unequal::MSDeformAttn": "_unequal"}
            name = kind + unequal[plugin_id]
            return lambda function: functions.setdefault(name, function)

        return decorator

    trt = types.ModuleType("tensorrt")
    trt.DataType = types.SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BF16="BF16")  # type: ignore
    plugin = types.ModuleType("tensorrt.plugin")
    for name in ("register", "autotune", "aot_impl"):
        setattr(plugin, name, taker(name))
    for kind in (TensorDesc, KernelLaunchParams, SymIntExprs, ShapeExprs):
        setattr(plugin, kind.__name__, kind)
    plugin.SymInt32 = lambda expression: expression.text  # type: ignore
    plugin.cdiv = lambda a, b: f"cdiv({a.text}, {b})"  # type: ignore
    plugin.AutoTuneCombination = lambda kinds, layout: (kinds, layout)  # type: ignore
    trt.plugin = plugin  # type: ignore
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    msda_plugin.register.cache_clear()
    try:
        ids = ("detr::MSDeformAttn", "detr_unequal::MSDeformAttn")
        assert msda_plugin.register() == msda_plugin.register() == ids
    finally:
        msda_plugin.register.cache_clear()
    return functions


def tensors(dtype: str = "HALF") -> tuple[TensorDesc, TensorDesc, TensorDesc]:
    """With batch unknown, as in an engine built for several batch sizes."""
    return (
        TensorDesc(dtype, "BSMD", (-1, 11394, 8, 32)),
        TensorDesc("FLOAT", "BQMVPx", (-1, 900, 8, 4, 4, 2)),
        TensorDesc("FLOAT", "BQMVP", (-1, 900, 8, 4, 4)),
    )


@pytest.mark.parametrize(
    ("points", "plugin"),
    [(None, msda_plugin.PLUGIN_ID), ((3, 1), msda_plugin.UNEQUAL_PLUGIN_ID)],
    ids=["equal", "unequal"],
)
def test_the_plugin_is_the_one_the_node_asks_for(
    points: tuple[int, ...] | None, plugin: str, registered: dict[str, Any]
) -> None:
    """TensorRT finds it by namespace and name, and fills its parameters from attributes."""
    node = make_node("v", "l", "w", "o", ((2, 2), (1, 1)), points=points)
    attributes = {a.name: a for a in node.attribute}
    namespace, name = plugin.split("::")
    kind = "register" if points is None else "register_unequal"
    wanted = list(inspect.signature(registered[kind]).parameters)[3:]
    assert wanted == [n for n in ("spatial_shapes", "points") if n in attributes]
    assert attributes["plugin_namespace"].s.decode() == namespace
    assert node.op_type == name
    assert attributes["plugin_version"].s == b"1"  # the version quick plugins have


def test_describes_its_output(registered: dict[str, Any]) -> None:
    out = registered["register"](*tensors(), spatial_shapes=FLAT)
    assert out.shape_expr == ("B", "Q", "M*D") and out.dtype == "HALF"
    # TensorRT reads the annotations themselves; as strings they would be refused.
    for function in registered.values():
        parameters = inspect.signature(function).parameters.values()
        assert not any(isinstance(parameter.annotation, str) for parameter in parameters)
    names = list(inspect.signature(registered["register"]).parameters)
    assert names == ["value", "locations", "weights", "spatial_shapes"]
    value, locations, weights = unequal_tensors()
    out = registered["register_unequal"](value, locations, weights, FLAT, UNEQUAL)
    assert out.shape_expr == ("B", "Q", "M*D") and out.dtype == "HALF"


def test_only_values_may_be_in_half_precision(registered: dict[str, Any]) -> None:
    assert registered["autotune"] is registered["autotune_unequal"]
    found = registered["autotune"](*tensors(), ())
    assert [kinds for kinds, _ in found] == [
        "FP32, FP32, FP32, FP32",
        "FP16, FP32, FP32, FP16",
        "BF16, FP32, FP32, BF16",
    ]


@pytest.mark.parametrize(
    ("dtype", "groups"), [("FLOAT", 16), ("HALF", 32), ("BF16", 32)], ids=lambda x: str(x)
)
def test_gives_ptx_and_its_launch(registered: dict[str, Any], dtype: str, groups: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    name, ptx, launch, scalars = registered["aot_impl"](*tensors(dtype), FLAT, (), 0)
    text = ptx.decode()
    assert f".entry {name}(" in text and "msda_backward" not in text and "\0" not in text
    # Three inputs, the two scalars, one output; pointers and integers in that order.
    entry = text[text.index(f".entry {name}(") :]
    kinds = [line.split()[1] for line in entry[: entry.index(")")].splitlines()[1:] if line.strip()]
    assert kinds == [".u64", ".u64", ".u64", ".u32", ".u32", ".u64"]
    assert scalars == ["Q", "B*Q*M"]
    assert launch.grid_x == f"cdiv(B*Q*M, {groups})" and launch.block_x == 128
    assert ".target sm_75" in text and text.splitlines().count(".version 6.3") == 1


UNEQUAL = np.array([3, 6, 3, 1], np.int32)


def unequal_tensors() -> tuple[TensorDesc, TensorDesc, TensorDesc]:
    return (
        TensorDesc("HALF", "BSMD", (-1, 11394, 8, 32)),
        TensorDesc("FLOAT", "BQMKx", (-1, 900, 8, 13, 2)),
        TensorDesc("FLOAT", "BQMK", (-1, 900, 8, 13)),
    )


def test_gives_the_ptx_of_unequal_points(registered: dict[str, Any]) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    kernel = registered["aot_impl_unequal"]
    name, ptx, launch, scalars = kernel(*unequal_tensors(), FLAT, UNEQUAL, (), 0)
    assert f".entry {name}(" in ptx.decode()
    assert scalars == ["Q", "B*Q*M"]
    assert launch.grid_x == "cdiv(B*Q*M, 32)" and launch.block_x == 128


@pytest.mark.parametrize(
    ("points", "samples"), [((3, 6, 3), 12), ((3, 6, 3, 1), 12)], ids=["levels", "samples"]
)
def test_points_that_are_not_the_weights_are_refused(points: tuple[int, ...], samples: int) -> None:
    with pytest.raises(UserError, match=f"do not fit 4 levels and {samples} samples"):
        msda_plugin.attention_of("float32", (1, 10, 8, 32), (1, 5, 8, samples), FLAT, points)


def assemblers() -> dict[Path, tuple[int, ...]]:
    """Each ptxas at hand, laid out or on the path, and the architectures of ours it knows."""
    laid_out = sorted((ROOT / "build/bindings/ptxas").glob("*/nvidia/*/bin/ptxas"))
    found = [*laid_out, *filter(None, [shutil.which("ptxas")])]
    result = {}
    for path in map(Path, found):
        told = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
        result[path] = tuple(sm for sm in ARCHITECTURES if f"'sm_{sm}'" in told)
    return result


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_embedded_ptx_is_what_old_drivers_take(dtype: str, tmp_path: Path) -> None:
    """Assembled by the oldest toolkit at hand, whose PTX is older than the compiler's."""
    pytest.importorskip("cuda.bindings.nvrtc")
    if not assemblers():
        pytest.skip("no ptxas: make bindings")
    kind = msda_plugin.attention_of(dtype, (-1, 11394, 8, 32), (-1, 900, 8, 4, 4), FLAT)
    ptx = msda_plugin.plugin_ptx(kind)
    compiled, embedded = (tuple(map(int, version.split("."))) for version in ptx.versions)
    assert embedded == (6, 3) < compiled
    (tmp_path / "kernel.ptx").write_bytes(ptx.code)
    for assembler, architectures in assemblers().items():
        assert {75, 80, 86, 89, 90} & set(architectures)
        for sm in architectures:
            command = [assembler, f"-arch=sm_{sm}", tmp_path / "kernel.ptx", "-o", tmp_path / "out"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_unknown_or_too_wide_heads_are_refused() -> None:
    for value in ((1, 10, -1, 32), (1, 10, 8, 37)):
        with pytest.raises(UserError, match="no kernel for"):
            msda_plugin.attention_of("float32", value, (1, 5, 8, 4, 4), FLAT)


def test_without_tensorrt_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    msda_plugin.register.cache_clear()
    with pytest.raises(UserError, match=r"detr-distillery\[trt\]"):
        msda_plugin.register()


def test_the_annotations_do_not_depend_on_numpys_alias(
    registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy 2.5 declares NDArray with a statement; TensorRT 10 takes neither that nor its kind."""
    kind = TypeVar("kind", bound=np.generic)
    alias = TypeAliasType("NDArray", np.ndarray[Any, np.dtype[kind]], type_params=(kind,))
    monkeypatch.setattr(npt, "NDArray", alias)
    spec = importlib.util.spec_from_file_location("fresh_msda_plugin", msda_plugin.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    registered.clear()
    fresh.register()
    for function in registered.values():
        for parameter in inspect.signature(function).parameters.values():
            # What TensorRT 10 asks of each annotation; 11 asks first whether it is a class.
            issubclass(parameter.annotation, TensorDesc)
            # A generic alias is taken for one up to Python 3.12 only.
            assert isinstance(parameter.annotation, type) or typing.get_origin(
                parameter.annotation
            ) in (list, tuple)
    shapes = inspect.signature(registered["register"]).parameters["spatial_shapes"].annotation
    assert shapes.__origin__ is np.ndarray
    assert typing.get_args(shapes.__args__[1]) == (np.int32,)
