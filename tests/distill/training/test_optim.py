"""Which parameters the optimizer pulls to zero."""

from __future__ import annotations

import pytest
from torch import nn

from distill.recipe import OptimizerRecipe
from distill.training.optim import build_optimizer


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
