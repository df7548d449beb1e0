"""Which parameters the optimizer pulls to zero, and how its rate goes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError
from torch import nn

from detr.config import Dinov3BackboneConfig
from detr.models.backbones.dinov3 import Dinov3
from distill.recipe import OptimizerRecipe
from distill.training.optim import build_optimizer, rate


@pytest.mark.parametrize(("option", "decay"), [(False, 0.0), (True, 1e-4)])
def test_norms_and_biases_are_decayed_where_asked(option: bool, decay: float) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(4, 3))
    model[2].weight.requires_grad_(False)
    recipe = OptimizerRecipe(decay_norms_and_biases=option)
    found = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, None, recipe).param_groups
        for p in group["params"]
    }
    assert len(found) == 4  # what is frozen is none of its parameters
    assert found[id(model[0].weight)] == 1e-4
    for parameter in (model[0].bias, model[1].weight, model[1].bias):
        assert found[id(parameter)] == decay


def test_the_rate_is_flat_and_then_falls_along_a_cosine() -> None:
    """The released schedule of DEIM by hand: 100 epochs of 10 steps, 40 flat, 20 at the end."""
    recipe = OptimizerRecipe(
        drops=(), warmup_steps=19, warmup_power=2, cosine=(0.4, 0.8), cosine_factor=0.25
    )
    found = [rate(step, 1000, recipe) for step in range(1000)]
    assert found[4] == pytest.approx((5 / 20) ** 2) and found[19] == 1
    assert set(found[19:401]) == {1.0} and set(found[800:]) == {0.25}
    assert found[600] == pytest.approx((1 + 0.25) / 2)
    assert found[500] == pytest.approx(0.25 + 0.75 * 0.5 * (1 + 0.5**0.5))
    assert all(before >= after for before, after in pairwise(found[19:]))


def test_drops_and_cosine_multiply() -> None:
    both = OptimizerRecipe(drops=(0.9,), cosine=(0.0, 0.5))
    assert rate(99, 100, both) == pytest.approx(0.05)
    assert rate(99, 100, OptimizerRecipe(drops=(0.9,))) == pytest.approx(0.1)
    # A part of the run that is less than a step falls at once.
    assert rate(1, 2, OptimizerRecipe(drops=(), cosine=(0.4, 0.41))) == 0.5


def test_a_cosine_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValidationError, match="no less than"):
        OptimizerRecipe(cosine=(0.5, 0.5))


def test_what_no_pretraining_has_seen_learns_at_the_main_rate() -> None:
    config = Dinov3BackboneConfig(width=24, heads=3, taps=(1, 2, 3), ffn=8, detail=4)
    model = nn.ModuleDict({"backbone": Dinov3(config), "neck": nn.Linear(2, 2)})
    recipe = OptimizerRecipe(lr=1e-3, backbone_lr=1e-5)
    found = {
        id(p): group["lr"]
        for group in build_optimizer(model, None, recipe).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        slow = name.startswith("backbone.") and "adapter" not in name
        assert found[id(parameter)] == (1e-5 if slow else 1e-3), name
