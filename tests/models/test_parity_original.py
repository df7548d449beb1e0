"""Every original repository's detector against what its own code answers; see golden/README.md."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from detr.errors import UserError
from detr.model_info import read_model_info
from detr.models import Detector, build_detector
from detr.models.weights.cli import weights
from detr.models.weights.original import convert
from detr.presets import preset

GOLDEN = Path(__file__).parent / "golden"
# (height, width) of a canvas and of the images on it; the second is no multiple of any stride.
CANVASES = [
    ((128, 192), ((128, 192), (90, 130))),
    ((101, 167), ((70, 167), (101, 111))),
]
TABLES = {"query_embed", "refpoint_embed", "tgt_embed", "label_enc", "patterns"} | {
    "level_embed",
    "level_embeds",
    "query_embedding",
    "label_embedding",
    "anchor_box_embed",
    "label_encoder",
}


def weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of natural size that follows from its name."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    x = generator.standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif len(shape) < 2:
        x = 0.1 * x + float(name.endswith(("weight", ".scale")))
    elif not TABLES & set(name.split(".")):
        x = x / np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(x.astype(np.float32))


def state_dict(golden) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for name, shape in zip(golden["names"].tolist(), golden["shapes"].tolist(), strict=True):
        shared = shape.startswith("=")
        state[name] = (
            state[shape[1:]].clone() if shared else weight(name, [int(n) for n in shape.split("x")])
        )
    return state


def images(canvas, sizes) -> torch.Tensor:
    """Coarse noise: every token of fine noise looks like every other."""
    coarse = np.random.RandomState(0).standard_normal((len(sizes), 3, 4, 6)).astype(np.float32)
    rows, columns = np.arange(canvas[0]) * 4 // canvas[0], np.arange(canvas[1]) * 6 // canvas[1]
    batch = 4 * coarse[:, :, rows][:, :, :, columns]
    for image, (height, width) in zip(batch, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return torch.from_numpy(batch)


def assert_close(ours: list[torch.Tensor] | torch.Tensor, theirs: np.ndarray) -> None:
    ours = torch.stack(ours) if isinstance(ours, list) else ours
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.npz")))
def test_same_answers(case):
    golden = np.load(GOLDEN / f"{case}.npz")
    options = json.loads(golden["options"].item())
    detector = convert(state_dict(golden), case, options).detector
    for i, (canvas, sizes) in enumerate(CANVASES):
        with torch.no_grad():
            memory = detector.encode(
                images(canvas, sizes), torch.tensor(sizes, dtype=torch.float32)
            )
            groups = detector.source.training_groups(memory)
            groups[0] = detector.queries(memory)[0]
            own, *more = detector.decode(memory, groups)
        assert_close(own.logits, golden[f"logits_{i}"])
        assert_close(own.boxes, golden[f"boxes_{i}"])
        spread = golden[f"logits_{i}"][-1].std(1).mean(), golden[f"boxes_{i}"][-1].std(1).mean()
        assert min(spread) > 1e-3, "queries that all say the same prove nothing"
        if f"proposal_boxes_{i}" in golden:
            proposals = own.group.proposals
            assert_close(proposals.logits, golden[f"proposal_logits_{i}"])
            assert_close(proposals.boxes, golden[f"proposal_boxes_{i}"])
        if f"many_boxes_{i}" in golden:
            assert_close(more[0].logits, golden[f"many_logits_{i}"])
            assert_close(more[0].boxes, golden[f"many_boxes_{i}"])


def detrex(backbone: dict[str, torch.Tensor], channels: Sequence[int]) -> Detector:
    """A detrex DINO with another backbone than the golden one's."""
    state = state_dict(np.load(GOLDEN / "detrex-dino.npz"))
    state = {name: x for name, x in state.items() if not name.startswith("backbone.")}
    convs = [(f"convs.{i}", c, 1) for i, c in enumerate(channels)]
    for place, inputs, side in [*convs, ("extra_convs.0", channels[-1], 3)]:
        name = f"neck.{place}.conv.weight"
        state[name] = weight(name, (256, inputs, side, side))
    return convert(state | backbone, "detrex").detector


@pytest.mark.slow
def test_detrex_convnext():
    golden = np.load(GOLDEN / "backbones" / "detrex-convnext.npz")
    detector = detrex(state_dict(golden), (192, 384, 768))
    assert detector.config.backbone.name == "convnext_tiny"
    with torch.no_grad():
        maps = detector.backbone(images(*CANVASES[0]))
    for i, found in enumerate(maps):
        # Every 48th channel is stored.
        assert_close(found[:, ::48], golden[f"map_{i}"])


@pytest.mark.slow
def test_detrex_swin():
    """It has the names of the original DINO's Swin, which an answer of its code holds."""
    golden = np.load(GOLDEN / "dino-swin.npz")
    named = state_dict(golden)
    ours = convert(named, "dino-swin", json.loads(golden["options"].item())).detector
    renamed = {
        f"backbone.{name.removeprefix('backbone.0.').removeprefix('body.')}": x
        for name, x in named.items()
        if name.startswith("backbone.0.")
    }
    theirs = detrex(renamed, (192, 384, 768))
    assert theirs.config.backbone == ours.config.backbone
    state = theirs.backbone.state_dict()
    for name, x in ours.backbone.state_dict().items():
        assert torch.equal(state[name], x), name


def test_a_convnext_of_unknown_size_is_refused():
    golden = np.load(GOLDEN / "backbones" / "detrex-convnext.npz")
    state = state_dict(golden)
    shallow = {name: x for name, x in state.items() if not name.startswith("backbone.stages.2.8.")}
    with pytest.raises(UserError, match="no ConvNeXt of width 96 and 8 blocks") as caught:
        detrex(shallow, (192, 384, 768))
    assert caught.value.code == "weights-backbone"


def test_every_family_is_held():
    original = {"detr", "conditional", "dab", "deformable", "dn-dab", "dn-deformable"} | {
        "dab-deformable",
        "h-deformable",
        "dino",
        "stable-dino",
    }
    dense, sampled = {"detr", "conditional", "dab"}, {"deformable", "deformable-two-stage", "dino"}
    detrex_has = dense | sampled | {"dn", "dab-deformable", "dn-deformable", "h-deformable"}
    families = (
        original
        | {f"mmdet-{name}" for name in dense | sampled}
        | {f"detrex-{name}" for name in detrex_has}
    )
    assert families <= {path.stem for path in GOLDEN.glob("*.npz")}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mmdet-dino", "stable-dino", "detrex-deformable", "dino"])
def test_without_its_class_heads_it_is_a_start(case):
    golden = np.load(GOLDEN / f"{case}.npz")
    whole = state_dict(golden)
    cut = {
        name: x
        for name, x in whole.items()
        if not any(part in name for part in ("class_embed", "cls_branches"))
    }
    found = convert(cut, case, json.loads(golden["options"].item()))
    assert found.detector.config.num_classes == 1
    assert any(".class_head" in name for name in found.without)
    assert not any("box" in name for name in found.without)
    heads = convert(whole, case, json.loads(golden["options"].item())).detector.state_dict()
    for name, x in found.detector.state_dict().items():
        assert name in found.without or torch.equal(x, heads[name]), name


@pytest.mark.slow
def test_class_names_of_mmdet(tmp_path):
    tensors = state_dict(np.load(GOLDEN / "mmdet-deformable.npz"))
    names = ("car", "bus", "van", "cat", "dog")
    meta = {"dataset_meta": {"classes": names, "palette": [(0, 0, 0)]}, "cfg": "model = 1"}
    torch.save({"meta": meta, "state_dict": tensors}, tmp_path / "epoch_12.pth")
    arguments = ["import", str(tmp_path / "epoch_12.pth"), "--out", str(tmp_path / "x.safetensors")]
    CliRunner().invoke(weights, arguments, catch_exceptions=False)
    info = read_model_info(tmp_path / "x.json")
    assert info.classes.names == names
    assert (info.preprocess.short, info.preprocess.long) == (800, 1333)


@pytest.mark.parametrize("case", sorted(p.stem for p in (GOLDEN / "rt_detr").glob("*.npz")))
def test_rt_detr(case):
    """On square canvases that images fill: its code knows no padding, and mixes up the axes."""
    golden = np.load(GOLDEN / "rt_detr" / f"{case}.npz")
    discrete = case.endswith("discrete")
    imported = convert(state_dict(golden), case, discrete=discrete, deim=case.startswith("deim-"))
    assert imported.detector.config.decoder.cross_attention.discrete == discrete
    assert "rows that no label ever reads" in imported.unused.values()
    # The number of queries is not in the tensors.
    detector = build_detector(imported.detector.config.replace(**{"queries.number": 11})).eval()
    detector.load_state_dict(imported.detector.state_dict())
    for i, side in enumerate((128, 160)):
        sizes = ((side, side), (side, side))
        with torch.no_grad():
            memory = detector.encode(
                images((side, side), sizes), torch.tensor(sizes, dtype=torch.float32)
            )
            output = detector.decode(memory, detector.queries(memory))[0]
        agree = assert_close_but_for_ties if discrete else assert_close
        agree(output.logits, golden[f"logits_{i}"])
        agree(output.boxes, golden[f"boxes_{i}"])
        spread = golden[f"logits_{i}"][-1].std(1).mean(), golden[f"boxes_{i}"][-1].std(1).mean()
        assert min(spread) > 1e-2, "queries that all say the same prove nothing"


def assert_close_but_for_ties(found, expected):
    """Whole cells are sampled: one in the middle of two is a processor's choice of rounding.

    One query of an image, at most, may have such a sample and be a little off.
    """
    found, expected = torch.stack(list(found)), torch.from_numpy(expected)
    off = ((found - expected).abs() > 1e-4).any(-1).any(0)
    assert int(off.sum(-1).max()) <= 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def whole_state_dict(golden) -> dict[str, torch.Tensor]:
    """With the tensors that keep their values."""
    state = state_dict(golden)
    for last, values in json.loads(golden["options"].item()).items():
        state |= {n: torch.tensor(values) for n in state if n.rpartition(".")[2] == last}
    return state


def cases(*folders: str) -> list[Any]:
    """Of some folders; those of a large backbone take seconds."""
    found = sorted(f"{f}/{p.stem}" for f in folders for p in (GOLDEN / f).glob("*.npz"))
    large = ("deimv2-m", "deimv2-l", "deimv2-x")
    return [
        pytest.param(case, marks=pytest.mark.slow) if case.endswith(large) else case
        for case in found
    ]


@pytest.mark.parametrize("case", cases("d_fine", "deimv2"))
def test_d_fine_and_deimv2(case):
    """On square canvases that images fill, as RT-DETR."""
    golden = np.load(GOLDEN / f"{case}.npz")
    imported = convert(whole_state_dict(golden), case, deim="/deim-" in case)
    reasons = {why for why in imported.unused.values() if not why.startswith("a copy of ")}
    assert reasons - {"of the backbone's pretraining"} == {
        "rows that no label ever reads",
        "follows from the points",
        "the config says it",
    }
    detector = build_detector(imported.detector.config.replace(**{"queries.number": 11})).eval()
    detector.load_state_dict(imported.detector.state_dict())
    for i, side in enumerate((128, 160)):
        sizes = ((side, side), (side, side))
        with torch.no_grad():
            memory = detector.encode(
                images((side, side), sizes), torch.tensor(sizes, dtype=torch.float32)
            )
            output = detector.decode(memory, detector.queries(memory))[0]
        assert_close(output.logits, golden[f"logits_{i}"])
        assert_close(output.boxes, golden[f"boxes_{i}"])
        spread = golden[f"logits_{i}"][-1].std(1).mean(), golden[f"boxes_{i}"][-1].std(1).mean()
        assert min(spread) > 1e-2, "queries that all say the same prove nothing"


def test_d_fines_average_is_read(tmp_path):
    """Its trainings leave the average under ``ema.module``, beside what was trained."""
    state = whole_state_dict(np.load(GOLDEN / "d_fine" / "d-fine-n.npz"))
    trained = {n: x + 1 if n == "decoder.enc_output.proj.bias" else x for n, x in state.items()}
    path, out = tmp_path / "last.pth", tmp_path / "ours.safetensors"
    torch.save({"model": trained, "ema": {"module": state, "updates": 7}}, path)
    arguments = ["import", str(path), "--out", str(out), "--ema", "--json"]
    result = CliRunner().invoke(weights, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found, info = load_file(out), read_model_info(out.with_suffix(".json"))
    assert torch.equal(
        found["source.proposals.project.bias"], state["decoder.enc_output.proj.bias"]
    )
    assert info.preprocess.size == (640, 640) and info.preprocess.std == (255.0,) * 3
    told = json.loads(result.output)["unused"]
    assert all(told.values()) and any("num_points_scale" in name for name in told)


DEIMV2 = ("atto", "femto", "pico", "n", "s", "m", "l", "x")


def found_kind(out: Path) -> str:
    """The kind of backbone of a checkpoint."""
    return read_model_info(out.with_suffix(".json")).detector.backbone.kind


@pytest.mark.parametrize(
    ("folder", "case", "family"),
    [
        ("d_fine", "deim-d-fine-s", "deim-d-fine-s"),
        ("rt_detr", "deim-rtdetrv2", "deim-rtdetrv2-r18"),
        *(("deimv2", f"deimv2-{size}", f"deimv2-{size}") for size in DEIMV2),
    ],
)
def test_deims_average_is_the_preset(folder, case, family, tmp_path):
    """Its trainings leave what D-FINE's and RT-DETR's do; the activation is told by the option."""
    state = whole_state_dict(np.load(GOLDEN / folder / f"{case}.npz"))
    path, out = tmp_path / "best_stg2.pth", tmp_path / "ours.safetensors"
    torch.save({"date": "x", "last_epoch": 3, "ema": {"module": state, "updates": 7}}, path)
    arguments = ["import", str(path), "--out", str(out)]
    arguments += ["--deim"] if case.startswith("deim-") else []
    result = CliRunner().invoke(weights, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert ("Meta's DINOv3" in result.output) == (folder == "deimv2")
    assert ("note: license:" in result.output) == (found_kind(out) == "dinov3")
    found, wanted = read_model_info(out.with_suffix(".json")).detector, preset(family, 5)
    if folder == "deimv2":
        # Read off a number of channels, which is a whole one.
        mine, theirs = (
            int(config.encoder.expansion * config.width / 2) for config in (found, wanted)
        )
        assert mine == theirs
        wanted = wanted.replace(**{"encoder.expansion": found.encoder.expansion})
    # What the small golden answers have otherwise, and where weights came from.
    same = ("encoder.layers", "encoder.ffn", "decoder.ffn", "decoder.layers", "queries.number")
    for part in ("neck", "positions", "decoder", "queries", "heads", "encoder"):
        mine, theirs = getattr(found, part), getattr(wanted, part)
        own = {key.rpartition(".")[2] for key in same if key.startswith(f"{part}.")}
        assert mine.model_dump(exclude=own) == theirs.model_dump(exclude=own), part
    assert found.mlp_activation == wanted.mlp_activation == "silu"
    assert found.backbone.body == wanted.backbone.body
    if found.backbone.kind == "dinov3":
        assert found.backbone == wanted.backbone


@pytest.mark.parametrize("case", ["detr", "deimv2/deimv2-n"])
def test_deims_option_is_for_its_detectors(case):
    with pytest.raises(UserError, match="--deim is for RT-DETRv2 and D-FINE"):
        convert(state_dict(np.load(GOLDEN / f"{case}.npz")), "x", deim=True)


@pytest.mark.parametrize("lost", ["backbone.stem.", "decoder.decoder.layers.0.gateway."])
def test_what_is_no_d_fine_is_refused(lost):
    golden = np.load(GOLDEN / "d_fine" / "d-fine-n.npz")
    state = {name: x for name, x in state_dict(golden).items() if not name.startswith(lost)}
    with pytest.raises(UserError) as caught:
        convert(state, "x")
    assert caught.value.code == "weights-backbone"


def test_rt_detr_over_another_backbone_is_refused():
    state = state_dict(np.load(GOLDEN / "rt_detr" / "rtdetr.npz"))
    state = {name: x for name, x in state.items() if not name.startswith("backbone.conv1")}
    with pytest.raises(UserError) as caught:
        convert(state, "x")
    assert caught.value.code == "weights-backbone"
