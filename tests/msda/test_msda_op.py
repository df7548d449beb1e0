"""The torch operator: registration, gradients, autocast, compile and export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detr import msda
from detr.models.attention.ms_deform_attn import ms_deform_attn, ms_deform_attn_reference

SHAPES = ((6, 9), (3, 5))
FLAT = [6, 9, 3, 5]


def inputs(
    dtype: torch.dtype = torch.float32, grad: bool = False, channels: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights of a small problem; a few locations lie outside."""
    torch.manual_seed(0)
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(2, 69, 2, channels, dtype=dtype)
    locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=coordinates) * 1.3 - 0.15
    weights = torch.rand(2, 5, 2, 6, dtype=coordinates).softmax(-1).view(2, 5, 2, 2, 3)
    tensors = (value, locations, weights)
    return tuple(tensor.requires_grad_(grad) for tensor in tensors)  # type: ignore[return-value]


@pytest.mark.slow
def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        value, locations, weights = inputs(dtype, grad=True)
        torch.library.opcheck(
            torch.ops.detr.ms_deform_attn.default, (value, FLAT, locations, weights)
        )
    value, locations, weights = inputs()
    torch.library.opcheck(
        torch.ops.detr.ms_deform_attn_backward.default,
        (torch.randn(2, 5, 16), value, FLAT, locations, weights),
    )


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: ms_deform_attn(value, SHAPES, locations, weights),
        inputs(torch.float64, grad=True, channels=3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_grid_sample_with_gradients(dtype: torch.dtype) -> None:
    ours, theirs = inputs(dtype, grad=True), inputs(dtype, grad=True)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    out = ms_deform_attn(ours[0], SHAPES, ours[1], ours[2])
    wanted = ms_deform_attn_reference(theirs[0], SHAPES, theirs[1], theirs[2])
    assert out.dtype == wanted.dtype == dtype
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    wanted.backward(gradient)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        scale = float(reference.grad.abs().max())
        torch.testing.assert_close(
            mine.grad, reference.grad, rtol=tolerance, atol=tolerance * scale
        )


def test_an_expanded_gradient_and_transposed_inputs_are_handled() -> None:
    value, locations, weights = inputs()
    value = value.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = ms_deform_attn(value, SHAPES, locations, weights)
    out.sum().backward()  # its gradient is one number, expanded
    reference = value.detach().clone().requires_grad_()
    ms_deform_attn_reference(reference, SHAPES, locations, weights).sum().backward()
    torch.testing.assert_close(value.grad, reference.grad)


def test_autocast_keeps_locations_and_weights_in_float32() -> None:
    value, locations, weights = inputs(torch.bfloat16)
    wanted = ms_deform_attn(value, SHAPES, locations, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.ops.detr.ms_deform_attn(value, FLAT, locations, weights)
        widened = ms_deform_attn(value, SHAPES, locations.half(), weights)
        assert ms_deform_attn(value.float(), SHAPES, locations, weights).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert widened.dtype == torch.bfloat16 and not torch.equal(widened, wanted)


class Attention(nn.Module):
    """The operator between two ordinary ones, as a model has it."""

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value * 2, SHAPES, locations.sigmoid(), weights.softmax(-1)) + 1


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    """Through the whole of it, code generation included."""
    tensors, again = inputs(grad=True), inputs(grad=True)
    compiled = torch.compile(Attention(), fullgraph=True)
    compiled(*tensors).square().sum().backward()
    Attention()(*again).square().sum().backward()
    for mine, wanted in zip(tensors, again, strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad)


def test_compiles_under_autocast_as_it_runs() -> None:
    """Values are halved by the product before, locations and weights stay float32."""
    value, locations, weights = inputs()

    def attend(value: Tensor, matrix: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ms_deform_attn(value @ matrix, SHAPES, locations, weights)

    arguments = (value, torch.eye(8), locations, weights)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*arguments)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, attend(*arguments), rtol=0, atol=0)


def test_exports_as_one_node_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Attention(), inputs(), dynamic_shapes=({0: batch},) * 3)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("detr.ms_deform_attn.default") == 1
    single = tuple(tensor[:1] for tensor in inputs())
    torch.testing.assert_close(program.module()(*single), Attention()(*single))


def test_wrong_arguments_are_refused() -> None:
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="value has 69 tokens"):
        ms_deform_attn(value, ((6, 9),), locations, weights)
    with pytest.raises(TypeError, match="value must be one of"):
        ms_deform_attn(value.int(), SHAPES, locations, weights)
    with pytest.raises(ValueError, match="a height and a width"):
        torch.ops.detr.ms_deform_attn(value, [6, 9, 3], locations, weights)


def test_without_the_kernel_grid_sample_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msda, "native_available", lambda: False)
    tensors = inputs(grad=True)
    out = ms_deform_attn(tensors[0], SHAPES, tensors[1], tensors[2])
    torch.testing.assert_close(out, ms_deform_attn_reference(tensors[0], SHAPES, *tensors[1:]))
    gradient = torch.randn_like(out)
    out.backward(gradient)
    reference = inputs(grad=True)
    ms_deform_attn_reference(reference[0], SHAPES, *reference[1:]).backward(gradient)
    for mine, wanted in zip(tensors, reference, strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad)
    with pytest.raises(ValueError, match="weights must have shape"):
        ms_deform_attn(tensors[0], SHAPES, tensors[1], tensors[2][:, :2])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_no_images_and_no_queries_have_gradients_of_their_shape(
    monkeypatch: pytest.MonkeyPatch, native: bool, batch: int, queries: int
) -> None:
    """With the kernel and, where it was not compiled, with grid_sample."""
    if not native:
        monkeypatch.setattr(msda, "native_available", lambda: False)
    whole = inputs()
    value, locations, weights = whole[0][:batch], whole[1][:batch], whole[2][:batch]
    leaves = [
        x.detach().clone().requires_grad_()
        for x in (value, locations[:, :queries], weights[:, :queries])
    ]
    out = ms_deform_attn(leaves[0], SHAPES, leaves[1], leaves[2])
    assert out.shape[:2] == (len(value), queries)
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


UNEQUAL = (4, 1)


def unequal_inputs(grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Four samples on the first level, one on the second."""
    value, locations, weights = inputs(torch.float64)
    tensors = (value, locations.flatten(3, 4)[..., :5, :], weights.flatten(3)[..., :5])
    return tuple(x.clone().requires_grad_(grad) for x in tensors)  # type: ignore[return-value]


def padded(locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same with as many points on every level, further ones weighing nothing."""
    weights = torch.cat((weights, weights.new_zeros(*weights.shape[:-1], 3)), -1)
    more = locations[..., -1:, :].expand(-1, -1, -1, 3, -1)
    return torch.cat((locations, more), -2).unflatten(3, (2, 4)), weights.unflatten(3, (2, 4))


@pytest.mark.parametrize("native", [True, False])
def test_unequal_points_are_equal_ones_without_padding(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(msda, "native_available", lambda: False)
    ours, theirs = unequal_inputs(grad=True), unequal_inputs(grad=True)
    out = ms_deform_attn(ours[0], SHAPES, ours[1], ours[2], UNEQUAL)
    wanted = ms_deform_attn_reference(theirs[0], SHAPES, *padded(theirs[1], theirs[2]))
    torch.testing.assert_close(out, wanted)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    wanted.backward(gradient)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_gradcheck_of_unequal_points() -> None:
    assert torch.autograd.gradcheck(
        lambda *tensors: ms_deform_attn(tensors[0], SHAPES, tensors[1], tensors[2], UNEQUAL),
        unequal_inputs(grad=True),
    )


@pytest.mark.slow
def test_opcheck_of_unequal_points() -> None:
    value, locations, weights = unequal_inputs(grad=True)
    arguments = (value, FLAT, locations, weights, UNEQUAL)
    torch.library.opcheck(torch.ops.detr.ms_deform_attn.default, arguments)


@pytest.mark.parametrize(
    ("points", "reason"),
    [((4,), "of 1 levels, not of 2"), ((5, 0), "1 or more"), ((3, 1), "locations must have shape")],
)
def test_wrong_numbers_of_points_are_refused(points: tuple[int, ...], reason: str) -> None:
    value, locations, weights = unequal_inputs()
    with pytest.raises(ValueError, match=reason):
        ms_deform_attn(value, SHAPES, locations, weights, points)
    with pytest.raises(ValueError, match=r"locations must be \[B, Q, M, V, P, 2\]"):
        ms_deform_attn(value, SHAPES, locations, weights)
