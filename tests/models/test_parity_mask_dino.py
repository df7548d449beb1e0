"""Mask DINO against what its own code answers; see golden/README.md."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from detr.errors import UserError
from detr.model_info import read_model_info
from detr.models.weights.cli import weights
from detr.models.weights.original import convert
from detr.presets import preset
from tests.models.test_parity_original import GOLDEN, assert_close, images, state_dict

FOLDER = GOLDEN / "mask_dino"
# Its code takes images that fill their canvas, a multiple of 32 (height, width).
CANVASES = ((128, 192), (96, 160))
# What is read without memory for it is copied nowhere, which torch warns of.
ON_NO_DEVICE = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
EVERY = 5  # rows and columns of masks that are stored


def thinned(masks: torch.Tensor) -> torch.Tensor:
    return masks[..., ::EVERY, ::EVERY]


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(path.stem for path in FOLDER.glob("*.npz")))
def test_same_answers(case):
    golden = np.load(FOLDER / f"{case}.npz")
    imported = convert(state_dict(golden), case, json.loads(golden["options"].item()))
    detector = imported.detector
    # In training the decoder also says what its heads see before the first layer.
    detector.decoder.train()
    for i, canvas in enumerate(CANVASES):
        sizes = (canvas, canvas)
        with torch.no_grad():
            memory = detector.encode(
                images(canvas, sizes), torch.tensor(sizes, dtype=torch.float32)
            )
            (own,) = detector.decode(memory, detector.queries(memory))
            layers = range(len(own.logits))
            masks = [memory.pixels.masks(own.initial.masks), *map(own.mask_logits, layers)]
        assert_close([own.initial.logits, *own.logits], golden[f"logits_{i}"])
        assert_close([own.initial.boxes, *own.boxes], golden[f"boxes_{i}"])
        assert_close(thinned(torch.stack(masks)), golden[f"masks_{i}"])
        proposals = own.group.proposals
        assert_close(proposals.logits, golden[f"proposal_logits_{i}"])
        assert_close(proposals.boxes, golden[f"proposal_boxes_{i}"])
        wanted = thinned(memory.pixels.masks(proposals.masks))
        assert_close(wanted, golden[f"proposal_masks_{i}"])
        spread = golden[f"logits_{i}"][-1].std(1).mean(), golden[f"boxes_{i}"][-1].std(1).mean()
        assert min(spread) > 1e-3, "queries that all say the same prove nothing"


def golden_state(case):
    return state_dict(np.load(FOLDER / f"{case}.npz"))


def swin_l(state):
    """The published Swin-L's names and shapes, from the golden Swin-T's; nothing but zeros.

    Twice the width and heads, 18 blocks in the third stage, windows of 12, six encoder and nine
    decoder layers, feed-forward layers of 2048, 80 classes.
    """
    counts = {r"backbone\.layers\.2\.blocks": 18, r"transformer\.encoder\.layers": 6}
    counts |= {r"predictor\.decoder\.layers": 9, r"predictor\.(?:decoder\.)?bbox_embed": 9}
    whole = {}
    for name, x in state.items():
        shape = list(x.shape)
        if name.endswith("relative_position_index"):
            shape = [144, 144]
        elif name.endswith("relative_position_bias_table"):
            shape = [529, 2 * shape[1]]
        elif name.startswith("backbone."):
            fixed = {3, 4}  # colors, and the side of a patch
            shape = [n if n in fixed else 2 * n for n in shape]
        elif re.search(r"input_proj\.\d\.0\.weight|adapter_1\.weight", name):
            shape[1] *= 2
        elif "level_embed" not in name:
            shape = [{48: 2048, 5: 80}.get(n, n) for n in shape]
        names = [name]
        for pattern, count in counts.items():
            if found := re.search(rf"({pattern})\.0\.", name):
                ends = name[: found.end(1)], name[found.end() :]
                names = [f"{ends[0]}.{i}.{ends[1]}" for i in range(count)]
        for each in names:
            whole[each] = torch.zeros(()).expand(shape)
    return whole


@pytest.mark.slow
@ON_NO_DEVICE
def test_the_published_swin_l_is_read():
    """Its layout; its numbers need weights that are not here."""
    state = swin_l(golden_state("mask-dino-swin"))
    with torch.device("meta"):
        found = convert(state, "swin-l.pth")
    config = found.detector.config
    wanted = preset("mask-dino-swin-l", 80, pretrained=False).replace(
        backbone={"strides": (4, 8, 16, 32)},
        neck={"levels": 5},
        queries={"initial_boxes": "bitmask", "coarse_to_fine": True},
    )
    assert config == wanted
    assert len(found.names) == 80
    assert found.notes == (
        "anchors are taken to be bitmask, as in the published config; no tensor tells "
        "(--initial-boxes)",
    )


@ON_NO_DEVICE
@pytest.mark.parametrize(
    ("case", "given", "boxes"),
    [
        ("mask-dino", None, "mask2box"),
        ("mask-dino-3scale", None, "bitmask"),
        ("mask-dino-3scale", "predicted", "predicted"),
    ],
)
def test_what_starts_the_boxes_can_be_told(case, given, boxes):
    with torch.device("meta"):
        found = convert(golden_state(case), case, initial_boxes=given)
    assert found.detector.config.queries.initial_boxes == boxes
    assert bool(found.notes) == (given is None)


@pytest.mark.slow
def test_it_is_told_on_the_command_line(tmp_path):
    source, out = tmp_path / "model.pth", tmp_path / "model.safetensors"
    torch.save({"model": golden_state("mask-dino-3scale")}, source)
    arguments = ["import", str(source), "--out", str(out), "--initial-boxes"]
    result = CliRunner().invoke(weights, [*arguments, "predicted"])
    assert result.exit_code == 0 and "anchors are taken" not in result.output
    assert read_model_info(out.with_suffix(".json")).detector.queries.initial_boxes == "predicted"


def test_no_other_family_is_told():
    other = state_dict(np.load(GOLDEN / "dino.npz"))
    with pytest.raises(UserError, match="--initial-boxes is for Mask DINO") as error:
        convert(other, "dino.pth", initial_boxes="bitmask")
    assert error.value.code == "weights-config"
