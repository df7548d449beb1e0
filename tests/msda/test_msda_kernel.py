"""The CPU kernels against float64 numpy: values, gradients, repeatability and refusals."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr import msda
from detr.msda import fallback
from detr.msda.check import check_sizes

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Case:
    """One problem with float32 inputs."""

    shapes: tuple[tuple[int, int], ...]
    value: Array
    locations: Array
    weights: Array
    grad_out: Array

    def forward64(self) -> Array:
        inputs = [x.astype(np.float64) for x in (self.value, self.locations, self.weights)]
        sizes = check_sizes(inputs[0], self.shapes, inputs[1], inputs[2])
        return fallback.forward(sizes, *inputs).reshape(sizes.out)

    def backward64(self) -> tuple[Array, Array, Array]:
        inputs = [x.astype(np.float64) for x in (self.value, self.locations, self.weights)]
        sizes = check_sizes(inputs[0], self.shapes, inputs[1], inputs[2])
        return fallback.backward(sizes, self.grad_out.astype(np.float64), *inputs)


def make_case(
    shapes: tuple[tuple[int, int], ...],
    batch: int = 1,
    heads: int = 2,
    channels: int = 32,
    queries: int = 7,
    points: int = 4,
    spread: float = 0.7,
    seed: int = 0,
) -> Case:
    """Random inputs; locations reach ``spread`` beyond the middle of the map on either side."""
    rng = np.random.default_rng(seed)
    tokens = sum(h * w for h, w in shapes)
    at = (batch, queries, heads, len(shapes), points)
    weights = rng.random(at, dtype=np.float32)
    weights /= weights.sum((3, 4), keepdims=True)
    return Case(
        shapes,
        rng.standard_normal((batch, tokens, heads, channels), dtype=np.float32),
        (0.5 + spread * (2 * rng.random((*at, 2), dtype=np.float32) - 1)).astype(np.float32),
        weights,
        rng.standard_normal((batch, queries, heads * channels), dtype=np.float32),
    )


cases = st.builds(
    make_case,
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4).map(
        tuple
    ),
    batch=st.sampled_from([1, 3]),
    heads=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 8, 16, 20, 32, 36, 64, 100]),
    queries=st.sampled_from([0, 1, 5, 33]),
    points=st.integers(1, 5),
    spread=st.sampled_from([0.4, 0.7, 30.0]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None)
@given(case=cases, threads=st.sampled_from([1, 2]))
def test_forward_is_within_2e_5_of_float64(case: Case, threads: int) -> None:
    out = msda.forward(case.value, case.shapes, case.locations, case.weights, threads=threads)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases, threads=st.sampled_from([1, 2]))
def test_backward_matches_float64(case: Case, threads: int) -> None:
    grads = msda.backward(
        case.grad_out, case.value, case.shapes, case.locations, case.weights, threads=threads
    )
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
    # The issue's bound for float16, on the scale of the output.
    if kind == "float16":
        assert np.abs(out - wanted).max() <= 2e-3 * np.abs(wanted).max()
    grads = msda.backward(case.grad_out, case.value, case.shapes, case.locations, case.weights)
    assert [grad.dtype for grad in grads] == [case.value.dtype, np.float32, np.float32]
    for grad, expected, slack in zip(grads, case.backward64(), (step, 0, 0), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad.astype(np.float64), expected, rtol=slack, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_values_of_every_size_survive(kind: str) -> None:
    """Zero, subnormal, largest and infinite values, read and written on every code path."""
    numbers = [0.0, -0.0, 2.0**-24, -(2.0**-20), 6e-5, 1.0, -3.14159, 60000.0, -65504.0, np.inf]
    values = np.array(numbers * 4, dtype=np.float32)[:36].reshape(1, 1, 1, 36)
    values = bfloat16(values) if kind == "bfloat16" else values.astype(np.float16)
    centre = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
    one = np.ones((1, 1, 1, 1, 1), np.float32)
    out = msda.forward(values, ((1, 1),), centre, one)
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


def test_every_instruction_set_agrees() -> None:
    from detr.msda import _native

    case = make_case(((13, 17), (6, 5)), batch=2, channels=44, queries=50)
    for target in _native.targets():
        out = np.empty_like(case.grad_out)
        arguments = (case.value, case.shapes, case.locations, case.weights)
        _native.forward(*arguments, out, 2, target)
        np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5, err_msg=target)
        grads = [np.empty_like(x) for x in (case.value, case.locations, case.weights)]
        _native.backward(case.grad_out, *arguments, *grads, 2, target)
        for grad, wanted in zip(grads, case.backward64(), strict=True):
            np.testing.assert_allclose(grad, wanted, rtol=2e-5, atol=1e-4, err_msg=target)
        half = case.value.astype(np.float16)
        narrow = np.empty_like(case.grad_out, dtype=np.float16)
        _native.forward(half, *arguments[1:], narrow, 1, target)
        np.testing.assert_allclose(narrow, case.forward64(), rtol=2e-3, atol=2e-3, err_msg=target)
    with pytest.raises(ValueError, match="no 'sse9' kernels"):
        _native.forward(*arguments, out, 2, "sse9")


@pytest.mark.parametrize(
    ("queries", "points", "heads"), [(700, 4, 3), (9, 256, 2), (40, 30, 9), (3, 4, 0)]
)
def test_many_queries_points_and_heads(queries: int, points: int, heads: int) -> None:
    """The sizes at which the work is cut differently: packed heads, few heads at once, none."""
    case = make_case(
        ((5, 6), (3, 3)), batch=2, heads=heads, channels=8, queries=queries, points=points
    )
    for threads in (1, 3):
        out = msda.forward(case.value, case.shapes, case.locations, case.weights, threads=threads)
        np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)
    grads = msda.backward(case.grad_out, case.value, case.shapes, case.locations, case.weights)
    for grad, wanted in zip(grads, case.backward64(), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-4)


def test_repeats_and_thread_counts_give_the_same_bits() -> None:
    case = make_case(((31, 40), (9, 13)), batch=3, heads=4, queries=301)
    runs = [
        (
            msda.forward(case.value, case.shapes, case.locations, case.weights, threads=threads),
            *msda.backward(
                case.grad_out,
                case.value,
                case.shapes,
                case.locations,
                case.weights,
                threads=threads,
            ),
        )
        for threads in (1, 2, 2, 5)
    ]
    for run in runs[1:]:
        for array, first in zip(run, runs[0], strict=True):
            assert array.tobytes() == first.tobytes()


def test_non_contiguous_inputs_are_copied_and_left_alone() -> None:
    case = make_case(((5, 6), (2, 3)))
    wanted = msda.forward(case.value, case.shapes, case.locations, case.weights)
    value = np.asfortranarray(case.value)
    locations = np.repeat(case.locations, 2, axis=1)[:, ::2]
    weights = case.weights[..., ::-1][..., ::-1]
    kept = value.copy()
    out = msda.forward(value, case.shapes, locations, weights)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(value, kept)


def test_several_callers_at_once_get_their_own_answers() -> None:
    made = [make_case(((21, 30), (8, 9)), queries=120, seed=seed) for seed in range(4)]
    results: dict[int, Array] = {}

    def work(index: int) -> None:
        case = made[index]
        for _ in range(10):
            results[index] = msda.forward(
                case.value, case.shapes, case.locations, case.weights, threads=2
            )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, case in enumerate(made):
        np.testing.assert_allclose(results[index], case.forward64(), rtol=0, atol=2e-5)


def test_a_forked_child_can_use_the_kernel() -> None:
    import multiprocessing

    case = make_case(((9, 9),), queries=100)
    msda.forward(case.value, case.shapes, case.locations, case.weights, threads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            out = pool.apply_async(
                msda.forward, (case.value, case.shapes, case.locations, case.weights, None, 2)
            ).get(timeout=30)
    np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)


def test_out_is_written_in_place() -> None:
    case = make_case(((5, 6),))
    out = np.empty_like(case.grad_out)
    assert msda.forward(case.value, case.shapes, case.locations, case.weights, out) is out
    np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)


GOOD = make_case(((3, 4), (2, 2)), queries=3)


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ValueError, "16 tokens", {"shapes": ((3, 4), (2, 3))}),
        (ValueError, "level 1 must be", {"shapes": ((4, 4), (0, 3))}),
        (ValueError, "level 0 must be", {"shapes": ((4.5, 4),)}),
        (ValueError, "level 0 must be", {"shapes": ((4, 4, 1),)}),
        (ValueError, "too large", {"shapes": ((2**20, 2**20),)}),
        (ValueError, "at least one level", {"shapes": ()}),
        (ValueError, r"value must be \[B, S, M, D\]", {"value": GOOD.value[0]}),
        (ValueError, "locations must be", {"locations": GOOD.locations[0]}),
        (ValueError, "locations must have shape", {"locations": GOOD.locations[..., :1]}),
        (ValueError, "at most 512", {"locations": np.zeros((1, 3, 2, 2, 300, 2), np.float32)}),
        (ValueError, "weights must have shape", {"weights": GOOD.weights[:, :2]}),
        (TypeError, "value must be one of", {"value": GOOD.value.astype(np.int32)}),
        (TypeError, "locations must be float32", {"locations": GOOD.locations.astype(np.float16)}),
        (TypeError, "weights must be float32", {"weights": GOOD.weights.astype(np.float64)}),
        (ValueError, "out must have shape", {"out": np.empty((1, 3, 63), np.float32)}),
        (TypeError, "out must be float32", {"out": np.empty((1, 3, 64), np.float64)}),
        (ValueError, "contiguous", {"out": np.empty((1, 3, 128), np.float32)[:, :, ::2]}),
    ],
)
def test_wrong_arguments_are_refused(
    error: type[Exception], text: str, change: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {
        "value": GOOD.value,
        "shapes": GOOD.shapes,
        "locations": GOOD.locations,
        "weights": GOOD.weights,
    }
    with pytest.raises(error, match=text):
        msda.forward(**{**arguments, **change})


def test_a_gradient_of_another_type_or_shape_is_refused() -> None:
    inputs = (GOOD.value, GOOD.shapes, GOOD.locations, GOOD.weights)
    with pytest.raises(ValueError, match="grad_out must have shape"):
        msda.backward(GOOD.grad_out[:, :2], *inputs)
    with pytest.raises(TypeError, match="grad_out must be float32"):
        msda.backward(GOOD.grad_out.astype(np.float16), *inputs)


def test_the_module_itself_never_reads_past_an_array() -> None:
    """The checks in C++ hold even for a caller who goes around the Python ones."""
    from detr.msda import _native

    out = np.empty_like(GOOD.grad_out)
    for value, locations, weights, target in (
        (GOOD.value[:, :-1], GOOD.locations, GOOD.weights, out),
        (GOOD.value, GOOD.locations[:, :, :, :1], GOOD.weights, out),
        (GOOD.value, GOOD.locations, GOOD.weights[:, :1], out),
        (GOOD.value, GOOD.locations, GOOD.weights, out[:, :1]),
        (GOOD.value, GOOD.locations.astype(np.float64), GOOD.weights, out),
        (GOOD.value.astype(np.float64), GOOD.locations, GOOD.weights, out),
    ):
        dense = [np.ascontiguousarray(x) for x in (value, locations, weights)]
        with pytest.raises((ValueError, TypeError)):
            _native.forward(dense[0], GOOD.shapes, dense[1], dense[2], target.copy(), 1)


def test_without_the_kernel_numpy_answers_after_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "detr.msda._native", None)
    monkeypatch.delattr(msda, "_native", raising=False)
    msda._kernel.cache_clear()
    try:
        case = make_case(((5, 6), (2, 3)))
        inputs = (case.value, case.shapes, case.locations, case.weights)
        with pytest.warns(RuntimeWarning, match="times slower"):
            out = msda.forward(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            grads = msda.backward(case.grad_out, *inputs)
            assert not msda.native_available()
        np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)
        for grad, wanted in zip(grads, case.backward64(), strict=True):
            np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-4)
    finally:
        msda._kernel.cache_clear()
