"""``detr weights import``: everything is used or listed, or it is an error."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from detr.config import BackboneConfig, ContrastiveDenoisingConfig
from detr.errors import UserError
from detr.models import load_model
from detr.models.tensors import read_checkpoint
from detr.models.weights import original_config
from detr.models.weights.classes import class_map, read_classes
from detr.models.weights.cli import weights
from detr.models.weights.hugging_face import read_folder
from detr.models.weights.original import convert
from detr.models.weights.renaming import Rule, rename, split_projections


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published tiny DETR."""
    path = tmp_path_factory.mktemp("published")
    config = transformers.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        id2label={0: "N/A", 1: "car", 2: "N/A", 3: "person"},
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 64,
            "hidden_sizes": [8, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage4"],
        },
    )
    transformers.DetrForObjectDetection(config).save_pretrained(path)
    return path


def changed(folder, tmp_path, change):
    """A copy of the folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_import_writes_a_checkpoint(folder, tmp_path):
    out = tmp_path / "detr.safetensors"
    arguments = ["import", str(folder), "--out", str(out), "--size", "96x160", "--json"]
    result = CliRunner().invoke(weights, arguments, catch_exceptions=False)
    report = json.loads(result.stdout)
    assert all(name.endswith("num_batches_tracked") for name in report["unused"])
    detector, info = load_model(out)
    assert info.classes.names == ("N/A", "car", "N/A-2", "person")
    assert info.preprocess.size == (96, 160)
    size = torch.tensor([[96.0, 160.0]])
    boxes, scores, labels = detector(torch.zeros(1, 3, 96, 160), size, size)
    assert boxes.shape == (1, 7, 4) and labels.max() < 4
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_a_tensor_without_a_place_is_named(folder, tmp_path):
    source = changed(folder, tmp_path, lambda t: t.update(mystery=torch.zeros(1)))
    with pytest.raises(UserError, match="mystery") as caught:
        read_folder(source)
    assert caught.value.code == "weights-unknown-tensor"


def test_a_missing_tensor_is_named(folder, tmp_path):
    source = changed(folder, tmp_path, lambda t: t.pop("bbox_predictor.layers.0.weight"))
    with pytest.raises(UserError, match=r"decoder\.box_heads\.0\.layers\.0\.weight") as caught:
        read_folder(source)
    assert caught.value.code == "checkpoint-mismatch"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "weights-source"),
        ("{", "weights-source"),
        ('{"model_type": "yolos"}', "weights-family"),
    ],
)
def test_what_is_no_detector_is_refused(folder, tmp_path, content, code):
    source = changed(folder, tmp_path, lambda t: None)
    if content is None:
        (source / "config.json").unlink()
    else:
        (source / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_folder(source)
    assert caught.value.code == code


def test_an_average_is_chosen_or_named(tmp_path):
    """RT-DETR's checkpoints hold both; published AP is the average's."""
    average, weights = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    path = tmp_path / "x.pth"
    torch.save({"ema": {"module": average, "updates": 3}, "model": weights}, path)
    assert torch.equal(read_checkpoint(path, averaged=True).tensors["a"], average["a"])
    main = read_checkpoint(path)
    assert torch.equal(main.tensors["a"], weights["a"]) and "ema" in main.note
    torch.save({"ema": {"module": average, "updates": 3}}, path)  # what the repository publishes
    assert torch.equal(read_checkpoint(path).tensors["a"], average["a"])


def test_rt_detr_brings_its_own_input(tmp_path):
    """Its images are divided by 255 and not normalized."""
    config = transformers.RTDetrConfig(
        backbone_config={
            "model_type": "rt_detr_resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 24, 32, 64],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_indices": [2, 3, 4],
        },
        encoder_in_channels=[24, 32, 64],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=7,
        id2label={0: "car", 1: "person"},
    )
    transformers.RTDetrForObjectDetection(config).save_pretrained(tmp_path / "published")
    for options, size in (([], [640, 640]), (["--size", "96x160"], [96, 160])):
        out = tmp_path / "ours.safetensors"
        arguments = ["import", str(tmp_path / "published"), "--out", str(out), *options]
        result = CliRunner().invoke(weights, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        sidecar = json.loads(out.with_suffix(".json").read_text())
        assert sidecar["preprocess"] == {"size": size, "mean": [0.0] * 3, "std": [255.0] * 3}
        assert sidecar["classes"]["names"] == ["car", "person"]


def test_copies_must_agree():
    rules = (Rule(r"head\.\d\.weight", "head.weight"),)
    same = torch.ones(2)
    renamed = rename({"head.0.weight": same, "head.1.weight": same.clone()}, rules, "x")
    assert list(renamed.tensors) == ["head.weight"]
    assert "copy of head.0.weight" in renamed.unused["head.1.weight"]
    with pytest.raises(UserError) as caught:
        rename({"head.0.weight": same, "head.1.weight": 2 * same}, rules, "x")
    assert caught.value.code == "weights-copies-differ"


def test_stacked_projections_are_split():
    split = split_projections(
        {"a.in_proj_weight": torch.arange(6.0).view(6, 1), "b": torch.ones(1)}
    )
    assert split["a.k_proj.weight"].flatten().tolist() == [2.0, 3.0]
    assert set(split) == {"a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight", "b"}


def original_names(detector, kind):
    """A detector's tensors as the original repositories name them."""
    own = {name: x.clone() for name, x in detector.state_dict().items()}
    out = {}

    def move(pattern, target):
        for name in [n for n in own if re.fullmatch(pattern, n)]:
            out[re.sub(f"^{pattern}$", target, name)] = own.pop(name)

    move(r"backbone\.body\.(.+)", r"backbone.0.body.\1")
    for i in range(detector.config.encoder.layers):
        ours, theirs = rf"encoder\.layers\.{i}\.", f"transformer.encoder.layers.{i}."
        move(ours + r"attention\.(.+)", theirs + r"self_attn.\1")
        move(ours + r"norm\.(.+)", theirs + r"norm1.\1")
        move(ours + r"ffn\.expand\.(.+)", theirs + r"linear1.\1")
        move(ours + r"ffn\.contract\.(.+)", theirs + r"linear2.\1")
        move(ours + r"ffn\.norm\.(.+)", theirs + r"norm2.\1")
    for i in range(detector.config.decoder.layers):
        ours, theirs = rf"decoder\.layers\.{i}\.", f"transformer.decoder.layers.{i}."
        prefix = f"decoder.layers.{i}.self_attention."
        for part in ("weight", "bias"):
            stacked = [own.pop(f"{prefix}query_key.{part}"), own.pop(f"{prefix}value.{part}")]
            out[f"{theirs}self_attn.in_proj_{part}"] = torch.cat(stacked)
        move(ours + r"self_attention\.output\.(.+)", theirs + r"self_attn.out_proj.\1")
        move(ours + r"cross_attention\.(.+)", theirs + r"cross_attn.\1")
        move(ours + r"cross_norm\.(.+)", theirs + r"norm1.\1")
        move(ours + r"self_norm\.(.+)", theirs + r"norm2.\1")
        move(ours + r"ffn\.expand\.(.+)", theirs + r"linear1.\1")
        move(ours + r"ffn\.contract\.(.+)", theirs + r"linear2.\1")
        move(ours + r"ffn\.norm\.(.+)", theirs + r"norm3.\1")
        for head, name in (("class_heads", "class_embed"), ("box_heads", "bbox_embed")):
            shared = len(getattr(detector.decoder, head)) == 1
            start = f"decoder.{head}.{0 if shared else i}."
            for tensor in [n for n in detector.state_dict() if n.startswith(start)]:
                value = detector.state_dict()[tensor].clone()
                rest = tensor.removeprefix(start)
                out[f"{name}.{i}.{rest}"] = value
                if kind == "dino":
                    out[f"transformer.decoder.{name}.{i}.{rest}"] = value.clone()
                own.pop(tensor, None)
    move(r"neck\.projections\.(.+)", r"input_proj.\1")
    move(r"encoder\.level_embedding", "transformer.level_embed")
    move(r"source\.embedding\.weight", "query_embed.weight")
    move(r"source\.reference_points\.(.+)", r"transformer.reference_points.\1")
    move(r"source\.content\.weight", "transformer.tgt_embed.weight")
    move(r"source\.reference_mlp\.(.+)", r"transformer.decoder.ref_point_head.\1")
    move(r"source\.proposals\.project\.(.+)", r"transformer.enc_output.\1")
    move(r"source\.proposals\.norm\.(.+)", r"transformer.enc_output_norm.\1")
    move(r"source\.proposals\.class_head\.(.+)", r"transformer.enc_out_class_embed.\1")
    move(r"source\.proposals\.box_head\.(.+)", r"transformer.enc_out_bbox_embed.\1")
    move(r"decoder\.norm\.(.+)", r"transformer.decoder.norm.\1")
    labels = own.pop("denoiser.label_embedding.weight", None)
    if labels is not None:
        out["label_enc.weight"] = torch.cat((labels, torch.zeros(1, labels.shape[1])))
    assert own == {}
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "dino", "dino_shared"])
def test_original_checkpoints(kind, make, tmp_path):
    changes = {"queries.denoising": ContrastiveDenoisingConfig()} if kind != "plain" else {}
    backbone = BackboneConfig(name="resnet18", norm="frozen")
    detector = make(kind, attention_heads=8, backbone=backbone, **changes)
    tensors = original_names(detector, "deformable" if kind == "plain" else "dino")
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": tensors, "args": argparse.Namespace(nheads=8), "epoch": 3}, path)
    out = tmp_path / "ours.safetensors"
    arguments = ["import", str(path), "--out", str(out)]
    CliRunner().invoke(weights, arguments, catch_exceptions=False)
    loaded, _ = load_model(out)
    for name, tensor in detector.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_other_repositories_are_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        convert({"model.0.conv.weight": torch.zeros(1)}, "x")
    assert caught.value.code == "weights-family"


def test_classes_of_a_file(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('{"names": ["car", "bus"], "category_ids": [3, 6]}')
    assert read_classes(path, 2).category_ids == (3, 6)
    by_id = read_classes(path, 7)
    assert by_id.names[3] == "car" and by_id.names[6] == "bus" and by_id.names[0] == "unused-0"
    with pytest.raises(UserError) as caught:
        read_classes(path, 5)
    assert caught.value.code == "weights-classes"
    path.write_text('{"categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}]}')
    assert read_classes(path, 2).names == ("a", "b")
    assert class_map(("a", "b")).category_ids == (0, 1)


def test_training_options_tell_what_tensors_do_not(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"x": torch.ones(1)}, "args": argparse.Namespace(dilation=True)}, path)
    assert read_checkpoint(path).options == {"dilation": True}
    tables = {"query_embed.weight": torch.zeros(1800, 4)}
    queries = original_config.hybrid(original_config.Source(tables, {}, "x")).queries
    assert (queries.number, queries.one_to_many.queries) == (300, 1500)
    told = {"num_queries_one2one": 900}
    queries = original_config.hybrid(original_config.Source(tables, told, "x")).queries
    assert (queries.number, queries.one_to_many.queries) == (900, 900)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"pre_norm": True}, "pre_norm True is not supported"),
        ({"pe_temperatureH": 20, "pe_temperatureW": 40}, r"temperatures 20\.0 and 40\.0 differ"),
    ],
)
def test_other_architectures_of_a_repository_are_refused(told, words):
    tensors = {
        "class_embed.bias": torch.zeros(3),
        "refpoint_embed.weight": torch.zeros(5, 4),
        "transformer.decoder.layers.0.linear1.weight": torch.zeros(16, 32),
        "backbone.0.body.layer3.1.conv2.weight": torch.zeros(1),
    }
    with pytest.raises(UserError, match=words) as caught:
        original_config.read(tensors, told, "x", original_config.dab)
    assert caught.value.code == "weights-config"


def test_other_backbones_of_a_repository_are_refused():
    tensors = {
        "class_embed.bias": torch.zeros(3),
        "query_embed.weight": torch.zeros(5, 32),
        "transformer.decoder.layers.0.linear1.weight": torch.zeros(16, 32),
    }
    for blocks in (
        {"backbone.0.body.layer3.7.conv2.weight": torch.zeros(1)},
        {
            "backbone.0.patch_embed.proj.weight": torch.zeros(64, 3, 4, 4),
            "backbone.0.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(169, 2),
        },
    ):
        with pytest.raises(UserError) as caught:
            original_config.read(tensors | blocks, {}, "x", original_config.dense)
        assert caught.value.code == "weights-backbone"
