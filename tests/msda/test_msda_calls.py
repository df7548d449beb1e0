"""How the CPU kernels are called: threads, memory, refusals, and without them numpy."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr import msda

sys.path.insert(0, str(Path(__file__).parent))
from msda_cases import Array, make_case


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


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_one_query_alone_and_among_many_give_the_same_bits(kind: type) -> None:
    """Many queries read packed values, whose outside corners are a row of zeros; one does not."""
    case = make_case(((9, 7), (4, 3), (1, 1)), heads=3, channels=20, queries=300)
    case.weights[:, 7] = np.inf
    case.weights[:, 8] = np.nan
    case.locations[:, 7:9] = 3
    case.locations[:, 9, :, 1] = np.nan
    kind_of_locations = np.float64 if kind is np.float64 else np.float32
    value = case.value.astype(kind)
    locations, weights = (x.astype(kind_of_locations) for x in (case.locations, case.weights))
    out = msda.forward(value, case.shapes, locations, weights)
    assert np.isfinite(out).all() and (out[:, 7:9] == 0).all() and out[:, 9].any()
    for query in range(300):
        one = slice(query, query + 1)
        alone = msda.forward(value, case.shapes, locations[:, one], weights[:, one])
        assert alone.tobytes() == out[:, one].tobytes()


def test_more_threads_than_work_or_machine_are_no_harm() -> None:
    case = make_case(((5, 6), (2, 3)), queries=3)
    inputs = (case.value, case.shapes, case.locations, case.weights)
    out = msda.forward(*inputs, threads=1_000_000)
    np.testing.assert_allclose(out, case.forward64(), rtol=0, atol=2e-5)
    grads = msda.backward(case.grad_out, *inputs, threads=1_000_000)
    np.testing.assert_allclose(grads[0], case.backward64()[0], rtol=0, atol=1e-4)


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
        (ValueError, "too large", {"shapes": ((1, 2**24 + 1),)}),
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


def test_arrays_of_another_device_are_refused() -> None:
    elsewhere = torch.empty(GOOD.value.shape, device="meta")
    with pytest.raises(TypeError, match="value is on device meta"):
        msda.forward(elsewhere, GOOD.shapes, GOOD.locations, GOOD.weights)
    out = torch.empty(GOOD.grad_out.shape, device="meta")
    with pytest.raises(TypeError, match="out is on device meta"):
        msda.forward(GOOD.value, GOOD.shapes, GOOD.locations, GOOD.weights, out)

    class OnGpu:
        """An array of a library that is neither numpy nor torch."""

        shape, dtype = GOOD.value.shape, GOOD.value.dtype

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

    with pytest.raises(TypeError, match=r"value is on device \(2, 0\)"):
        msda.forward(OnGpu(), GOOD.shapes, GOOD.locations, GOOD.weights)
    with pytest.raises(TypeError, match="value must be a numpy array or speak DLPack, not list"):
        msda.forward(GOOD.value.tolist(), GOOD.shapes, GOOD.locations, GOOD.weights)


def test_a_level_longer_than_float_counts_is_refused_by_the_module_too() -> None:
    from detr.msda import _native

    cells = 2**24 + 1
    value, out = np.empty((1, cells, 1, 0), np.float32), np.empty((1, 1, 0), np.float32)
    locations, weights = np.zeros((1, 1, 1, 1, 1, 2), np.float32), np.ones((1, 1, 1, 1, 1), "f")
    with pytest.raises(ValueError, match="too large"):
        _native.forward(value, ((1, cells),), locations, weights, out, 1)


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


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without the kernel."""
    monkeypatch.setitem(sys.modules, "detr.msda._native", None)
    monkeypatch.delattr(msda, "_native", raising=False)
    msda._kernel.cache_clear()
    yield
    msda._kernel.cache_clear()


@pytest.mark.usefixtures("uncompiled")
def test_without_the_kernel_numpy_answers_after_one_warning() -> None:
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


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:detr was installed without")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_without_the_kernel_torch_tensors_are_read_and_written(kind: str) -> None:
    case = make_case(((5, 6), (2, 3)))
    value = torch.from_numpy(case.value).to(getattr(torch, kind)).requires_grad_()
    locations, weights = torch.from_numpy(case.locations), torch.from_numpy(case.weights)
    out = torch.empty(case.grad_out.shape, dtype=value.dtype)
    assert msda.forward(value, case.shapes, locations, weights, out) is out
    allowed = 2e-5 if kind == "float32" else 2e-2
    np.testing.assert_allclose(out.float().numpy(), case.forward64(), rtol=0, atol=allowed)
