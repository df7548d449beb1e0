"""Swin on canvases of any size, against the transformers library's from random weights."""

from __future__ import annotations

import re

import pytest
import torch

from detr.config import BackboneConfig
from detr.models.backbones.timm import Backbone

SMALL = {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2)}
# How the library calls what ours calls otherwise; q, k and v are joined before.
NAMES = {
    r"^swin\.embeddings\.patch_embeddings\.projection": "body.patch_embed.proj",
    r"^swin\.embeddings\.norm": "body.patch_embed.norm",
    r"^hidden_states_norms\.stage1": "norms.0",
    r"^hidden_states_norms\.stage2": "norms.1",
    r"^hidden_states_norms\.stage3": "norms.2",
    r"^hidden_states_norms\.stage4": "norms.3",
    # The library merges patches at a stage's end, timm at the next one's start.
    r"^swin\.encoder\.layers\.0\.downsample": "body.layers_1.downsample",
    r"^swin\.encoder\.layers\.1\.downsample": "body.layers_2.downsample",
    r"^swin\.encoder\.layers\.2\.downsample": "body.layers_3.downsample",
    r"^swin\.encoder\.layers\.": "body.layers_",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.relative_position_bias\.": "attn.",
    r"attention\.o_proj": "attn.proj",
    r"attention\.": "attn.",
}


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The library's tensors by our names."""
    joined = dict(state)
    for name in state:
        if ".q_proj." in name:
            parts = [joined.pop(name.replace(".q_", f".{part}_")) for part in "qkv"]
            joined[name.replace("q_proj", "qkv")] = torch.cat(parts)
    for pattern, ours in NAMES.items():
        joined = {re.sub(pattern, ours, name): x for name, x in joined.items()}
    return {n: x for n, x in joined.items() if not n.startswith("swin.layernorm")}


def small(**changes: object) -> Backbone:
    settings = {"strides": (4, 8, 16, 32), "map_norm": True, "options": SMALL}
    return Backbone(BackboneConfig(name="swin_tiny_patch4_window7_224", **{**settings, **changes}))


# The last map is never smaller than a window: there the library, unlike detectors' code, may not.
@pytest.mark.parametrize("canvas", [(224, 224), (256, 320), (231, 409)])
def test_maps_are_the_librarys(canvas):
    import transformers

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    published = transformers.SwinBackbone(
        transformers.SwinConfig(**SMALL, window_size=7, image_size=224, out_features=stages)
    ).eval()
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        ours = small().eval()
        ours.load_state_dict(renamed(published.state_dict()))
        images = torch.randn(2, 3, *canvas)
        theirs = published(images).feature_maps
        for got, want in zip(ours(images), theirs, strict=True):
            assert want.std() > 0.1
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_maps_are_channels_second_at_their_stride():
    backbone = small(strides=(8, 32), map_norm=False).eval()
    assert backbone.channels == (16, 64)
    shapes = [tuple(x.shape) for x in backbone(torch.zeros(1, 3, 64, 101))]
    assert shapes == [(1, 16, 8, 13), (1, 64, 2, 4)]


def test_a_window_sees_no_opposite_edge():
    """A change at the right edge reaches the left one only through windows between them."""
    backbone = small(strides=(4,), map_norm=False, options={**SMALL, "depths": (2, 1, 1, 1)}).eval()
    images = torch.randn(1, 3, 40, 160, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[..., -8:] += 1
    with torch.no_grad():
        difference = (backbone(changed)[0] - backbone(images)[0]).abs().amax((0, 1, 2))
    assert difference[-2:].min() > 1e-3
    assert difference[:20].max() == 0


@pytest.mark.slow
def test_published_sizes():
    for name, millions in (("tiny", 27.5), ("small", 48.8), ("base", 86.7), ("large", 195.0)):
        window = "window7_224" if name in ("tiny", "small") else "window12_384"
        with torch.device("meta"):
            found = Backbone(BackboneConfig(name=f"swin_{name}_patch4_{window}"))
        assert sum(p.numel() for p in found.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
