"""Training starts where it does in the original repositories.

Their transformers set every matrix inside to Xavier's uniform distribution, DINO's content queries
included, since these lie within. What lies outside – heads, DETR's input projection, learned
anchors, positions and labels – starts as torch starts it, or at the values given in the code.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detr.models import build_detector


def xavier(x: Tensor) -> None:
    field = math.prod(x.shape[2:])
    uniform(x, math.sqrt(6 / ((x.shape[0] + x.shape[1]) * field)))


def torchs(x: Tensor) -> None:
    """``nn.Linear`` and ``nn.Conv2d``: within one over the root of the number of inputs."""
    uniform(x, 1 / math.sqrt(math.prod(x.shape[1:])))


def uniform(x: Tensor, bound: float) -> None:
    assert 0.8 * bound < x.abs().max() <= bound * (1 + 1e-6)
    assert x.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def normal(x: Tensor) -> None:
    assert x.std() == pytest.approx(1, rel=0.25)


def zero(x: Tensor) -> None:
    assert (x == 0).all()


def rare(x: Tensor) -> None:
    """Scores of 0.01."""
    torch.testing.assert_close(x.sigmoid(), torch.full_like(x, 0.01))


def small(x: Tensor) -> None:
    """Centers stay, sizes shrink."""
    assert x.tolist() == [0, 0, -2, -2]


def stacked(x: Tensor) -> None:
    """Query and key rows of one Xavier matrix with the value's."""
    uniform(x, math.sqrt(6 / (4 * x.shape[1])))


LAST = "decoder.box_heads.0.layers.2"
HIDDEN = {"decoder.box_heads.0.layers.0.weight": torchs}
ZERO = {f"{LAST}.weight": zero, f"{LAST}.bias": zero, **HIDDEN}
SMALL = {f"{LAST}.weight": zero, f"{LAST}.bias": small, **HIDDEN}
CONDITIONAL = {
    "neck.projections.0.0.weight": torchs,
    "decoder.spatial.scale.layers.1.weight": xavier,
    "decoder.layers.1.cross_attention.spatial_key.weight": xavier,
    "decoder.class_heads.0.bias": rare,
    **ZERO,
}
ANCHORS = {"source.anchors.weight": normal, "source.reference_mlp.layers.0.weight": xavier}
DAB = {
    **CONDITIONAL,
    **ANCHORS,
    "decoder.spatial.size.layers.0.weight": xavier,
    "encoder.position_scale.layers.0.weight": xavier,
}
DEFORMABLE = {
    "neck.projections.0.0.weight": xavier,
    "neck.projections.3.0.weight": xavier,
    "neck.projections.0.0.bias": zero,
    "encoder.level_embedding": normal,
    "encoder.layers.0.attention.sampling_offsets.weight": zero,
    "encoder.layers.0.attention.value_proj.weight": xavier,
    "encoder.layers.0.ffn.expand.weight": xavier,
    "decoder.layers.0.self_attention.query_key.weight": stacked,
    "decoder.layers.0.self_attention.output.weight": xavier,
    "decoder.class_heads.0.weight": torchs,
    "decoder.class_heads.0.bias": rare,
}
LEARNED = {
    **DEFORMABLE,
    **SMALL,
    "source.embedding.weight": normal,
    "source.reference_points.weight": xavier,
}
DAB_DEFORMABLE = {
    **DEFORMABLE,
    **SMALL,
    **ANCHORS,
    "decoder.box_heads.1.layers.2.bias": zero,
    "decoder.position_scale.layers.0.weight": xavier,
    "source.content.weight": normal,
}
PROPOSALS = {
    **DEFORMABLE,
    **ZERO,
    "source.proposals.project.weight": xavier,
    "source.proposals.class_head.bias": rare,
    "source.proposals.box_head.layers.2.weight": zero,
    "source.proposals.box_head.layers.2.bias": zero,
}
DINO = {
    **PROPOSALS,
    "source.content.weight": xavier,
    "source.reference_mlp.layers.1.weight": xavier,
    "denoiser.label_embedding.weight": normal,
}
START = {
    "detr": {
        "neck.projections.0.0.weight": torchs,
        "source.embedding.weight": normal,
        "decoder.layers.0.cross_attention.key.weight": stacked,
        "decoder.class_heads.0.weight": torchs,
        f"{LAST}.weight": torchs,
        **HIDDEN,
    },
    "conditional-detr": {
        **CONDITIONAL,
        "source.embedding.weight": normal,
        "source.reference_points.layers.1.weight": xavier,
    },
    "dab-detr": DAB,
    "dab-detr-patterns": {**DAB, "source.content.weight": normal},
    "dn-dab-detr": {**DAB, "denoiser.label_embedding.weight": normal},
    "deformable-detr": LEARNED,
    "deformable-detr-refine": {**LEARNED, "decoder.box_heads.1.layers.2.bias": zero},
    "deformable-detr-two-stage": {**PROPOSALS, "source.project.weight": xavier},
    "dab-deformable-detr": DAB_DEFORMABLE,
    "dn-deformable-detr": {**DAB_DEFORMABLE, "denoiser.label_embedding.weight": normal},
    "h-deformable-detr": {**PROPOSALS, "source.content.weight": normal},
    "dino": DINO,
    "dino-official": DINO,
}


@pytest.mark.parametrize("family", START)
def test_weights_start_as_the_originals_do(family, small_preset):
    torch.manual_seed(0)
    weights = build_detector(small_preset(family)).state_dict()
    for name, starts in START[family].items():
        starts(weights[name])
