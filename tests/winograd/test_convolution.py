"""The convolution kernel against torch in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from detr import winograd
from detr.winograd import Activation

pytestmark = pytest.mark.skipif(not winograd.available(), reason="no kernel, or no AVX2")

ACTIVATIONS = {"none": lambda x: x, "relu": functional.relu, "silu": functional.silu}


def drawn(*sizes: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(sizes).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "inputs", "outputs"),
    [
        ((2, 5, 8), 8, 16),
        ((1, 1, 1), 8, 16),
        ((1, 2, 31), 24, 48),
        ((3, 14, 9), 64, 32),
        ((1, 13, 42), 256, 512),  # more tiles to a block than it has rows of registers
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_convolution(
    size: tuple[int, int, int], inputs: int, outputs: int, activation: Activation
) -> None:
    maps, added = drawn(*size, inputs), drawn(*size, outputs)
    weights, bias = drawn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, drawn(outputs)
    x, w, b, a = (torch.from_numpy(y).double() for y in (maps, weights, bias, added))
    plain = functional.conv2d(x.permute(0, 3, 1, 2), w, b, padding=1).permute(0, 2, 3, 1)
    kernel = winograd.Convolution(weights, bias, activation)
    for more in (None, added):
        wanted = ACTIVATIONS[activation](plain if more is None else plain + a)
        found = kernel(maps, threads=1, added=more)
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5, rtol=0)
        assert np.array_equal(kernel(maps, threads=3, added=more), found)


def test_silu_of_large_values_is_finite() -> None:
    bias = np.linspace(-2000, 2000, 16, dtype=np.float32)
    kernel = winograd.Convolution(np.zeros((16, 8, 3, 3), np.float32), bias, "silu")
    found = kernel(np.zeros((1, 2, 2, 8), np.float32))[0, 0, 0]
    wanted = functional.silu(torch.from_numpy(bias)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-6)


def test_values_that_are_no_numbers_stay_so() -> None:
    maps = np.zeros((1, 4, 4, 8), np.float32)
    maps[0, 0, 0] = np.nan
    for activation in ("none", "silu"):
        kernel = winograd.Convolution(np.ones((16, 8, 3, 3), np.float32), None, activation)
        assert np.isnan(kernel(maps)[0, 0, 0]).all()


@pytest.mark.parametrize("shape", [(16, 8, 1, 1), (8, 8, 3, 3), (16, 3, 3, 3), (16, 8, 3)])
def test_other_weights_are_refused(shape: tuple[int, ...]) -> None:
    assert not winograd.takes(shape)
    with pytest.raises(ValueError, match="no kernel for weights"):
        winograd.Convolution(np.zeros(shape, np.float32))


def test_nothing_outside_the_arrays_is_touched() -> None:
    kernel = winograd.Convolution(drawn(16, 8, 3, 3))
    maps, good = drawn(1, 4, 4, 8), np.empty((1, 4, 4, 16), np.float32)
    for out in (good[:, :3], good[..., :15], np.empty((1, 4, 4, 32), np.float32)):
        with pytest.raises((ValueError, TypeError)):
            kernel(maps, out)
    with pytest.raises(ValueError, match="added has the wrong shape"):
        kernel(maps, good, added=np.ascontiguousarray(good[:, :3]))
    with pytest.raises((ValueError, TypeError)):
        kernel(drawn(1, 4, 4, 16), good)
