"""RF-DETR against the transformers library, from random weights, in every decoder layer.

On square canvases alone: the library cuts by a window's height where its width belongs, so on a
wide canvas its windows are strips from everywhere. What is right there, the direct computation in
``tests/models/backbones/test_vit.py`` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.weights import rf_detr
from detr.models.weights.hugging_face import convert, read_folder
from detr.presets import preset
from tests.models.test_parity_lw_detr import (
    check_every_layer,
    library,
    look_at_images_only,
    pixel_mask,
    window_masks,
)
from tests.models.test_parity_rt_detr import images

DINO = {
    "model_type": "rf_detr_dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_windows": 2,
    "patch_size": 8,
    "image_size": 48,
    "out_indices": [1, 3],
}
TINY = {
    "num_labels": 5,
    "num_queries": 7,
    "group_detr": 3,
    "d_model": 32,
    "decoder_ffn_dim": 48,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 8,
    "decoder_n_points": 2,
    "decoder_layers": 2,
    "backbone_config": DINO,
}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
CASES: dict[str, dict[str, Any]] = {
    # As RF-DETR-base, whose last block has no map.
    "a block too many": TINY,
    # As nano to large.
    "all blocks": {**TINY, "backbone_config": {**DINO, "out_indices": [2, 4]}},
    "no windows": {**TINY, "backbone_config": {**DINO, "num_windows": 1}},
    "other norms": {**TINY, "layer_norm_eps": 1e-2},
    "RF-DETR-nano": {
        "num_labels": 91,
        "num_queries": 60,
        "decoder_layers": 2,
        "decoder_n_points": 2,
        "layer_norm_eps": 1e-6,
        "backbone_config": {
            **DINO,
            **SMALL,
            "patch_size": 16,
            "image_size": 384,
            "out_indices": [3, 6, 9, 12],
        },
    },
}
# Both are square; the second is no multiple of the grid of positions.
CANVASES = [128, 192]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_layer_answers_alike_on_squares(case: str) -> None:
    model = library("rf_detr", CASES[case])
    state = {name: x.clone() for name, x in model.state_dict().items()}
    imported = convert(model.config.to_dict(), state, "test")
    assert set(imported.unused.values()) <= {
        "of a block after the last map",
        "added to the class token",
        "of the backbone's pretraining",
    }
    assert imported.notes == ()
    ours, inner = imported.detector, model.config.backbone_config
    for side in CANVASES:
        canvas, inside = (side, side), (side * 5 // 8, side * 3 // 4)
        batch = images(canvas)
        whole = pixel_mask(canvas, canvas)
        check_every_layer(model, ours, batch, whole, torch.tensor([canvas] * 2).float())
        mask = pixel_mask(canvas, inside)
        cells = side // inner.patch_size
        hooks = look_at_images_only(
            model.model.backbone.backbone.encoder.layer,
            *with_class_tokens(mask, (cells, cells), inner.num_windows),
        )
        valid = torch.tensor([canvas, inside]).float()
        check_every_layer(model, ours, batch * mask[:, None], mask, valid)
        for hook in hooks:
            hook.remove()


def with_class_tokens(mask: Tensor, cells: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """:func:`window_masks` with a token of no place before each window, which always counts."""
    _, everywhere = window_masks(mask, cells, count)
    windows = nn.functional.pad(everywhere.unflatten(1, (count * count, -1)), (1, 0), value=True)
    return windows.flatten(0, 1), windows.flatten(1)


@pytest.mark.slow
def test_on_a_wide_canvas_the_library_mixes_strips_and_we_do_not() -> None:
    """What lies in one half of a canvas cannot reach the other through windowed blocks alone."""
    only_windows = {**DINO, "num_hidden_layers": 1, "out_indices": [1]}
    # The library makes blocks up to its last map windowed but for those whose numbers are maps'.
    model = library("rf_detr", {**TINY, "backbone_config": only_windows})
    assert not model.model.backbone.backbone.encoder.layer[0].global_attention
    state = {name: x.clone() for name, x in model.state_dict().items()}
    ours = convert(model.config.to_dict(), state, "test").detector

    def reached(canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cells whose map changes with the pixels of the first window: the library's, ours."""
        batch = images(canvas)[:1]
        other = batch.clone()
        other[:, :, : canvas[0] // 2, : canvas[1] // 2] *= -1
        valid = torch.tensor([canvas]).float()
        with torch.no_grad():
            theirs = [model.model.backbone.backbone(x).feature_maps[0] for x in (batch, other)]
            own = [ours.backbone(x, valid)[0] for x in (batch, other)]
        found = [(a - b).abs().amax(1)[0] > 1e-6 for a, b in (theirs, own)]
        return found[0], found[1]

    for canvas in ((64, 64), (64, 192)):
        theirs, own = reached(canvas)
        first = torch.zeros_like(own)
        first[: own.shape[0] // 2, : own.shape[1] // 2] = True
        assert torch.equal(own, first)
        assert torch.equal(theirs, first) == (canvas[0] == canvas[1])


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("num_feature_levels", 2, "weights-config"),
        ("backbone_config", {**DINO, "use_swiglu_ffn": True}, "weights-config"),
        ("backbone_config", {**DINO, "num_register_tokens": 4}, "weights-config"),
        ("backbone_config", {"model_type": "dinov2"}, "weights-backbone"),
    ],
)
def test_another_architecture_is_refused(option: str, value: Any, code: str) -> None:
    published = {"model_type": "rf_detr", **TINY, option: value}
    with pytest.raises(UserError, match="test: ") as caught:
        convert(published, {}, "test")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("size", "side"),
    [("nano", 384), ("small", 512), ("medium", 576), ("large", 704), ("base", 560)],
)
def test_a_size_is_fed_what_it_was_trained_on(size: str, side: int) -> None:
    assert rf_detr.preprocess(preset(f"rfdetr-{size}", 3)).size == (side, side)


def test_a_folder_without_a_size_is_fed_what_its_positions_say(tmp_path: Path) -> None:
    library("rf_detr", TINY).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    imported = read_folder(tmp_path)
    assert imported.preprocess.size == (DINO["image_size"], DINO["image_size"])
    assert imported.preprocess.mean == PreprocessConfig(size=(48, 48)).mean
    assert read_folder(tmp_path, (64, 96)).preprocess.size == (64, 96)
