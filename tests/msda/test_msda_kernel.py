"""The CPU kernels against float64 numpy: values, gradients, precision and borders."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr import msda
from detr.msda import fallback
from detr.msda.check import check_sizes
from detr.points import Points

sys.path.insert(0, str(Path(__file__).parent))
from msda_cases import Array, Case, make_case


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Problems of all sizes, about half of them with unequal numbers of points."""
    level = st.tuples(st.integers(1, 9), st.integers(1, 9))
    shapes = tuple(draw(st.lists(level, min_size=1, max_size=4)))
    each = st.tuples(*[st.integers(1, 7)] * len(shapes))
    sizes = st.builds(
        make_case,
        st.just(shapes),
        points=st.one_of(st.integers(1, 5), each),
        batch=st.sampled_from([1, 3]),
        heads=st.integers(1, 3),
        channels=st.sampled_from([1, 3, 8, 16, 20, 32, 36, 64, 100]),
        queries=st.sampled_from([0, 1, 5, 33, 200]),
        spread=st.sampled_from([0.4, 0.7, 30.0]),
        seed=st.integers(0, 2**31),
    )
    return draw(sizes)


@settings(max_examples=60, deadline=None)
@given(case=cases(), threads=st.sampled_from([1, 2]))
def test_forward_is_within_2e_5_of_float64(case: Case, threads: int) -> None:
    inputs = (case.value, case.shapes, case.locations, case.weights)
    out = msda.forward(*inputs, threads=threads, points=case.points)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases(), threads=st.sampled_from([1, 2]))
def test_backward_matches_float64(case: Case, threads: int) -> None:
    inputs = (case.value, case.shapes, case.locations, case.weights)
    grads = msda.backward(case.grad_out, *inputs, threads=threads, points=case.points)
    for name, grad, wanted in zip(
        ("value", "locations", "weights"), grads, case.backward64(), strict=True
    ):
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=2e-5 * scale, err_msg=name)


def bfloat16(array: Array) -> Array:
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("channels", [8, 20, 32, 64])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_values_lose_only_what_storing_them_loses(kind: str, channels: int) -> None:
    case = make_case(((9, 14), (5, 7)), channels=channels, queries=40)
    narrow = bfloat16 if kind == "bfloat16" else (lambda x: x.astype(np.float16))
    case.value, case.grad_out = narrow(case.value), narrow(case.grad_out)
    step = 2.0**-8 if kind == "bfloat16" else 2.0**-11  # half a unit in the last place
    out = msda.forward(case.value, case.shapes, case.locations, case.weights)
    assert out.dtype == case.value.dtype
    wanted = case.forward64()
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=step, atol=2e-6)
    # The bound for float16, on the scale of the output.
    if kind == "float16":
        assert np.abs(out - wanted).max() <= 2e-3 * np.abs(wanted).max()
    grads = msda.backward(case.grad_out, case.value, case.shapes, case.locations, case.weights)
    assert [grad.dtype for grad in grads] == [case.value.dtype, np.float32, np.float32]
    for grad, expected, slack in zip(grads, case.backward64(), (step, 0, 0), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad.astype(np.float64), expected, rtol=slack, atol=1e-5 * scale)


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_values_of_every_size_survive(kind: str, flush: bool) -> None:
    """Zero, subnormal, largest and infinite values, read and written on every code path.

    Also where the process flushes denormal floats, as training makes it: these are no such.
    """
    numbers = [0.0, -0.0, 2.0**-24, -(2.0**-20), 6e-5, 1.0, -3.14159, 60000.0, -65504.0, np.inf]
    values = np.array(numbers * 4, dtype=np.float32)[:36].reshape(1, 1, 1, 36)
    values = bfloat16(values) if kind == "bfloat16" else values.astype(np.float16)
    center = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
    one = np.ones((1, 1, 1, 1, 1), np.float32)
    torch.set_flush_denormal(flush)
    out = msda.forward(values, ((1, 1),), center, one)
    np.testing.assert_array_equal(out.reshape(-1), values.reshape(-1))


def test_float64_keeps_its_precision() -> None:
    case = make_case(((6, 5), (3, 2)))
    inputs = [x.astype(np.float64) for x in (case.value, case.locations, case.weights)]
    out = msda.forward(inputs[0], case.shapes, inputs[1], inputs[2])
    np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=1e-13)
    grads = msda.backward(
        case.grad_out.astype(np.float64), inputs[0], case.shapes, inputs[1], inputs[2]
    )
    for grad, wanted in zip(grads, case.backward64(), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-12)


def test_gradients_match_finite_differences() -> None:
    """Holds the numpy reference itself, which shares no code with the kernels."""
    case = make_case(((4, 5), (2, 3)), channels=3, queries=2, points=2, spread=0.55)
    value, locations, weights = (
        x.astype(np.float64) for x in (case.value, case.locations, case.weights)
    )
    grad_out = case.grad_out.astype(np.float64)
    sizes = check_sizes(value, case.shapes, locations, weights)
    grads = fallback.backward(sizes, grad_out, value, locations, weights)
    rng = np.random.default_rng(1)
    for index, tensor in enumerate((value, locations, weights)):
        direction = rng.standard_normal(tensor.shape) * 1e-6
        ends = []
        for sign in (1, -1):
            moved = [value, locations, weights]
            moved[index] = tensor + sign * direction
            ends.append((fallback.forward(sizes, *moved).reshape(sizes.out) * grad_out).sum())
        assert ends[0] - ends[1] == pytest.approx(2 * (grads[index] * direction).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("x", "column"), [(0.0, 0), (1.0, 3), (-0.124, 0), (1.124, 3), (0.375, 1), (0.5, None)]
)
def test_borders_fade_to_zero(x: float, column: int | None) -> None:
    """On a map of 4 columns: half the outermost texel on the edge, nothing half a cell outside."""
    values = np.array([1.0, 2.0, 4.0, 8.0], np.float32).reshape(1, 4, 1, 1)
    at = np.array([x, 0.5], np.float32).reshape(1, 1, 1, 1, 1, 2)
    out = float(msda.forward(values, ((1, 4),), at, np.ones((1, 1, 1, 1, 1), np.float32))[0, 0, 0])
    position = x * 4 - 0.5
    if column is None:
        assert out == pytest.approx(3.0)
    else:
        share = max(0.0, 1 - abs(position - column))
        assert out == pytest.approx(share * float(values[0, column, 0, 0]), abs=1e-5)


@pytest.mark.parametrize("far", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e9, -3.0])
def test_far_infinite_and_nan_locations_count_as_zero(far: float) -> None:
    case = make_case(((5, 4), (3, 3)))
    case.locations[:, ::2, :, :, 1, 0] = far
    case.locations[:, 1::2, :, :, 2, 1] = far
    out = msda.forward(case.value, case.shapes, case.locations, case.weights)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)
    grads = msda.backward(case.grad_out, case.value, case.shapes, case.locations, case.weights)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert (grads[1][:, ::2, :, :, 1] == 0).all() and (grads[2][:, ::2, :, :, 1] == 0).all()


@pytest.mark.parametrize("points", [4, (7, 2)], ids=["equal", "unequal"])
@pytest.mark.parametrize("queries", [9, 600], ids=["in-place", "packed"])
def test_every_instruction_set_agrees(points: Points, queries: int) -> None:
    from detr.msda import _native

    case = make_case(((13, 17), (6, 5)), batch=2, channels=44, queries=queries, points=points)
    unequal = case.points or ()
    for target in _native.targets():
        out = np.empty_like(case.grad_out)
        arguments = (case.value, case.shapes, case.locations, case.weights)
        _native.forward(*arguments, out, 2, target, unequal)
        np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5, err_msg=target)
        grads = [np.empty_like(x) for x in (case.value, case.locations, case.weights)]
        _native.backward(case.grad_out, *arguments, *grads, 2, target, unequal)
        for grad, wanted in zip(grads, case.backward64(), strict=True):
            np.testing.assert_allclose(grad, wanted, rtol=2e-5, atol=1e-4, err_msg=target)
        half = case.value.astype(np.float16)
        narrow = np.empty_like(case.grad_out, dtype=np.float16)
        _native.forward(half, *arguments[1:], narrow, 1, target, unequal)
        np.testing.assert_allclose(narrow, case.forward64(), rtol=2e-3, atol=2e-3, err_msg=target)
    with pytest.raises(ValueError, match="no 'sse9' kernels"):
        _native.forward(*arguments, out, 2, "sse9", unequal)


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0), (0, 0)])
def test_no_images_and_no_queries_are_no_work(batch: int, queries: int) -> None:
    """Shares of the work are quotients, and no images once ended the process."""
    from detr.msda import _native

    case = make_case(((5, 4), (3, 3)), batch=batch, queries=queries)
    arguments = (case.value, case.shapes, case.locations, case.weights)
    for target in _native.targets():
        _native.forward(*arguments, np.empty_like(case.grad_out), 2, target)
        grads = [np.full_like(x, 9) for x in (case.value, case.locations, case.weights)]
        _native.backward(case.grad_out, *arguments, *grads, 2, target)
        assert (grads[0] == 0).all()
