"""Deformable attention as a TensorRT quick plugin, compiled ahead of time.

TensorRT's ONNX parser finds the plugin by the node's ``plugin_namespace`` and embeds the kernel's
PTX in the engine, so the machine that runs the engine needs neither this package nor a plugin
library. Locations, weights and sums stay in float32; the values may be FP32, FP16 or BF16.

TensorRT reads the types of the functions below when it is given them, so they must not become
strings: this module does without ``from __future__ import annotations``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from detr.errors import UserError
from detr.msda.cuda_kernels import compile_ptx
from detr.msda.cuda_source import FORWARD, Attention
from detr.points import Points
from engines.msda_function import OP_TYPE, PLUGIN_NAMESPACE, UNEQUAL_PLUGIN_NAMESPACE

if TYPE_CHECKING:
    IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
else:

    class IntArray:
        """Stands for an array of int32 in an annotation.

        TensorRT 10 wants annotations to be classes. numpy's own ``NDArray[np.int32]`` is taken for
        one up to Python 3.12, unless numpy is 2.5 or newer; from then on it is none. What TensorRT
        reads of it are these two attributes.
        """

        __origin__ = np.ndarray
        __args__ = (tuple[int, ...], np.dtype[np.int32])


PLUGIN_ID = f"{PLUGIN_NAMESPACE}::{OP_TYPE}"
UNEQUAL_PLUGIN_ID = f"{UNEQUAL_PLUGIN_NAMESPACE}::{OP_TYPE}"

# PTX for the oldest architecture TensorRT still serves: the driver compiles it for any newer one,
# and the forward kernel uses nothing that came later. NVRTC writes the newest version of PTX it
# knows, which a driver older than it refuses whatever the text holds; this is the first version
# with that architecture, and every driver TensorRT runs on takes it.
_VIRTUAL_ARCHITECTURE = "compute_75"
_PTX_VERSION = "6.3"


def network_flags(trt: Any) -> int:
    """Flags for ``create_network`` by which the parser asks for the ahead-of-time kernel."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


@dataclass(frozen=True)
class Ptx:
    """A kernel as it is embedded.

    Attributes:
        code: Its text.
        versions: The version of PTX the compiler wrote and the one the text now names.
    """

    code: bytes
    versions: tuple[str, str]


def plugin_ptx(attention: Attention) -> Ptx:
    """Compiles the kernel TensorRT embeds.

    Raises:
        UserError: ``cuda-bindings-missing``.
    """
    text = compile_ptx(attention, _VIRTUAL_ARCHITECTURE).rstrip(b"\0")
    found = re.search(rb"^\.version (\d+\.\d+)$", text, re.M)
    assert found is not None, "PTX begins with its version"
    code = text[: found.start(1)] + _PTX_VERSION.encode() + text[found.end(1) :]
    return Ptx(code, (found[1].decode(), _PTX_VERSION))


def attention_of(
    dtype: str,
    value: Sequence[int],
    weights: Sequence[int],
    spatial_shapes: Iterable[int],
    points: Iterable[int] | None = None,
) -> Attention:
    """The kernel for tensors of these shapes; batch and number of queries may be unknown (-1).

    Args:
        dtype: Type of the values.
        value: Shape ``[B, S, M, D]``.
        weights: Shape ``[B, Q, M, V, P]``, or ``[B, Q, M, K]`` with ``points``.
        spatial_shapes: Height and width of each level, one after the other.
        points: Number of points of each level where they are unequal.

    Raises:
        UserError: ``plugin-shape`` where heads, channels or points are not known to the builder,
            are too many for the kernel, or are not those of the levels and weights.
    """
    flat = [int(size) for size in spatial_shapes]
    shapes = tuple(zip(flat[::2], flat[1::2], strict=True))
    heads, channels, samples = int(value[2]), int(value[3]), int(weights[-1])
    counts: Points = samples if points is None else tuple(int(count) for count in points)
    if not isinstance(counts, int) and (len(counts) != len(shapes) or sum(counts) != samples):
        raise UserError(
            "plugin-shape",
            f"{UNEQUAL_PLUGIN_ID}: points {list(counts)} do not fit {len(shapes)} levels and "
            f"{samples} samples",
        )
    attention = Attention(dtype, heads, channels, len(shapes), counts, shapes, forward_only=True)
    if min(heads, channels) < 1 or not attention.supported:
        raise UserError(
            "plugin-shape",
            f"{PLUGIN_ID}: no kernel for {heads} heads of {channels} channels with {counts} points "
            "(heads, channels and points must be known when the engine is built)",
        )
    return attention


@cache
def register() -> tuple[str, str]:
    """Makes the plugins known to TensorRT, once per process.

    Returns:
        Ids of the plugin for equal and of that for unequal numbers of points: one has an attribute
        more, and the attributes of a quick plugin are the parameters of its functions.

    Raises:
        UserError: ``tensorrt-missing``.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as reason:
        raise UserError(
            "tensorrt-missing",
            "the TensorRT plugin needs TensorRT with quick plugins: "
            f"pip install 'detr-distillery[trt]' ({reason})",
        ) from reason

    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
    }

    def like_value(value: trtp.TensorDesc, locations: trtp.TensorDesc) -> trtp.TensorDesc:
        out = value.like()
        batch, _, heads, channels = value.shape_expr
        out.shape_expr = trtp.ShapeExprs.from_tuple(
            (batch, locations.shape_expr[1], heads * channels)
        )
        return out

    def compiled(
        value: trtp.TensorDesc,
        weights: trtp.TensorDesc,
        spatial_shapes: IntArray,
        points: IntArray | None,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        attention = attention_of(
            names[value.dtype], value.shape, weights.shape, spatial_shapes, points
        )
        batch, queries, heads = weights.shape_expr[0], weights.shape_expr[1], weights.shape_expr[2]
        groups = batch * queries * heads
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(groups, attention.groups_per_block)
        launch.block_x = attention.threads
        # The kernel's arguments are the inputs, these two, and the output.
        scalars = trtp.SymIntExprs(2)
        scalars[0] = trtp.SymInt32(queries)
        scalars[1] = trtp.SymInt32(groups)
        return FORWARD, plugin_ptx(attention).code, launch, scalars

    @trtp.register(PLUGIN_ID)  # type: ignore[untyped-decorator]
    def describe(
        value: trtp.TensorDesc,
        locations: trtp.TensorDesc,
        weights: trtp.TensorDesc,
        spatial_shapes: IntArray,
    ) -> trtp.TensorDesc:
        return like_value(value, locations)

    @trtp.register(UNEQUAL_PLUGIN_ID)  # type: ignore[untyped-decorator]
    def describe_unequal(
        value: trtp.TensorDesc,
        locations: trtp.TensorDesc,
        weights: trtp.TensorDesc,
        spatial_shapes: IntArray,
        points: IntArray,
    ) -> trtp.TensorDesc:
        return like_value(value, locations)

    @trtp.autotune(PLUGIN_ID)  # type: ignore[untyped-decorator]
    @trtp.autotune(UNEQUAL_PLUGIN_ID)  # type: ignore[untyped-decorator]
    def formats(
        value: trtp.TensorDesc,
        locations: trtp.TensorDesc,
        weights: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return [
            trtp.AutoTuneCombination(f"{kind}, FP32, FP32, {kind}", "LINEAR")
            for kind in ("FP32", "FP16", "BF16")
        ]

    @trtp.aot_impl(PLUGIN_ID)  # type: ignore[untyped-decorator]
    def compile_kernel(
        value: trtp.TensorDesc,
        locations: trtp.TensorDesc,
        weights: trtp.TensorDesc,
        spatial_shapes: IntArray,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return compiled(value, weights, spatial_shapes, None)

    @trtp.aot_impl(UNEQUAL_PLUGIN_ID)  # type: ignore[untyped-decorator]
    def compile_unequal_kernel(
        value: trtp.TensorDesc,
        locations: trtp.TensorDesc,
        weights: trtp.TensorDesc,
        spatial_shapes: IntArray,
        points: IntArray,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return compiled(value, weights, spatial_shapes, points)

    # TensorRT holds on to the functions; naming them keeps linters from calling them unused.
    _ = (describe, describe_unequal, formats, compile_kernel, compile_unequal_kernel)
    return PLUGIN_ID, UNEQUAL_PLUGIN_ID
