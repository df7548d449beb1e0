"""What an import reads of a file or folder: the model's own tensors, and none is lost silently."""

from __future__ import annotations

import json
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from detr.config import ClassMap
from detr.errors import UserError
from detr.models import build_detector, load_model
from detr.models.start import start
from detr.models.tensors import read_checkpoint, read_tensors
from detr.models.weights.cli import weights
from detr.models.weights.hugging_face import read_folder

RESNET = {
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [8, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
LAYERS = {
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
}
NAMES = {0: "car", 1: "person", 2: "bike"}
ONE_MAP = {"backbone_config": {**RESNET, "out_features": ["stage4"]}}
MAPS = {"backbone_config": {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
# Ours has other group norms at other widths than 256.
SAMPLED = {**MAPS, "d_model": 256, "num_feature_levels": 4}
REFINED = {**SAMPLED, "with_box_refine": True}
TWO_STAGE = {**REFINED, "two_stage": True, "two_stage_num_proposals": 8}
KINDS = {
    "detr": ("detr", {**ONE_MAP, "d_model": 32}),
    "conditional": ("conditional_detr", {**ONE_MAP, "d_model": 32}),
    "dab": ("dab-detr", {**ONE_MAP, "hidden_size": 32}),
    "dab-untied": ("dab-detr", {**ONE_MAP, "hidden_size": 32, "tie_word_embeddings": False}),
    "deformable": ("deformable_detr", SAMPLED),
    "refined": ("deformable_detr", REFINED),
    "refined-untied": ("deformable_detr", {**REFINED, "tie_word_embeddings": False}),
    "two-stage": ("deformable_detr", TWO_STAGE),
    "two-stage-untied": ("deformable_detr", {**TWO_STAGE, "tie_word_embeddings": False}),
}


def save(kind, path, **options):
    """The library's model, as it writes itself, with weights that all differ from each other."""
    torch.manual_seed(0)
    model_type, own = KINDS[kind]
    config = transformers.CONFIG_MAPPING[model_type](**LAYERS, **own, id2label=NAMES)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    # Untied or not, the heads inside the decoder are copies of those outside.
    for inner, outer in (("bbox_embed", "bbox_predictor"), ("class_embed", "class_embed")):
        outside = getattr(model, outer, getattr(model, inner, None))
        inside = getattr(model.model.decoder, inner, None)
        if inside is not None:
            inside.load_state_dict(outside.state_dict())
    model.save_pretrained(path, **options)
    # Read again: what is tied becomes one, as it is for everybody who uses the file.
    return transformers.AutoModelForObjectDetection.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("detr")
    save("detr", path)
    return path


def convert_cli(*arguments):
    return CliRunner().invoke(weights, ["import", *map(str, arguments), "--json"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_the_library_writes(kind, tmp_path):
    theirs = save(kind, tmp_path)
    found = read_folder(tmp_path)
    images = 4 * torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        wanted = theirs(pixel_values=images)
        memory = found.detector.encode(images, torch.tensor([[64.0, 96.0]]))
        given = found.detector.decode(memory, found.detector.queries(memory))[0]
    torch.testing.assert_close(given.logits[-1], wanted.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(given.boxes[-1], wanted.pred_boxes, atol=1e-4, rtol=0)
    assert any("tied" in note for note in found.notes) == (kind == "refined")


def test_one_lost_head_is_not_filled_in(tmp_path):
    save("refined-untied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["class_embed.1.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: decoder\.class_heads\.1\.bias") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "checkpoint-mismatch"


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(x, theirs[name]) for name, x in ours.items())


def beside(folder, path):
    (path / "config.json").write_text((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors")


def test_files_beside_the_model_are_not_read(folder, tmp_path):
    tensors = beside(folder, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    zeros = {name: torch.zeros_like(x) for name, x in tensors.items()}
    for name in ("optimizer.safetensors", "adapter_model.safetensors", "z.safetensors"):
        save_file(zeros, tmp_path / name)
    torch.save(zeros, tmp_path / "pytorch_model.bin")
    assert same(read_folder(tmp_path).detector, read_folder(folder).detector)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "weights-source"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_models_in_several_files(kind, folder, tmp_path):
    tensors = beside(folder, tmp_path)
    names = sorted(tensors)
    parts = [names[::2], names[1::2]]
    stem = "model" if kind == "safetensors" else "pytorch_model"
    table = {}
    for i, part in enumerate(parts):
        file = tmp_path / f"{stem}-0000{i + 1}-of-00002.{kind}"
        content = {name: tensors[name] for name in part}
        save_file(content, file) if kind == "safetensors" else torch.save(content, file)
        table |= dict.fromkeys(part, file.name)
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert same(read_folder(tmp_path).detector, read_folder(folder).detector)

    index.write_text(json.dumps({"weight_map": {**table, "more": file.name}}))
    with pytest.raises(UserError, match="more is not in") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "weights-source"
    index.write_text(json.dumps({"weight_map": {**table, "more": f"../{file.name}"}}))
    with pytest.raises(UserError, match="no weight_map") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "weights-source"
    index.write_text(json.dumps({"weight_map": table}))
    file.unlink()
    with pytest.raises(UserError, match=file.name) as caught:
        read_folder(tmp_path)
    assert caught.value.code == "checkpoint-missing"


def test_a_plain_pickle_of_a_folder(folder, tmp_path):
    torch.save(OrderedDict(beside(folder, tmp_path)), tmp_path / "pytorch_model.bin")
    assert same(read_folder(tmp_path).detector, read_folder(folder).detector)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(value, folder, tmp_path):
    tensors = beside(folder, tmp_path)
    tensors["bbox_predictor.layers.0.weight"][0, 0] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"box_heads\.0\.layers\.0\.weight") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "checkpoint-nonfinite"


@pytest.mark.parametrize(
    ("table", "names", "noted"),
    [
        ({"0": "car", "1": "person", "2": "bike"}, ("car", "person", "bike"), False),
        ({"2": "bike", "0": "car", "1": "person"}, ("car", "person", "bike"), False),
        # The library counts these as three outputs and calls the second car.
        ({"1": "car", "2": "person", "3": "bike"}, ("unused-0", "car", "person"), True),
        ({"0": "car", "2": "bike"}, ("car", "unused-1", "bike"), False),
    ],
)
def test_names_follow_their_keys(table, names, noted, folder, tmp_path):
    save_file(beside(folder, tmp_path), tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": table}))
    found = read_folder(tmp_path)
    assert found.names == names
    assert any("no such output" in note for note in found.notes) == noted


@pytest.mark.parametrize("key", ["car", "1.0", "-1", ""])
def test_keys_that_are_no_index_are_refused(key, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {key: "x"}}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="id2label") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "weights-classes"


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        (None, {"short": 800, "long": 1333}),
        ({"size": {"shortest_edge": 480, "longest_edge": 700}}, {"short": 480, "long": 700}),
        ({"size": 600, "max_size": 1000}, {"short": 600, "long": 1000}),
        ({"size": {"max_height": 320, "max_width": 640}}, {"size": (320, 640)}),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, {"mean": 127.5, "std": 63.75}),
        ({"do_normalize": False}, {"mean": 0.0, "std": 255.0}),
        (
            {"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [2.0] * 3},
            {"mean": 100.0, "std": 2.0},
        ),
    ],
)
def test_images_are_made_as_the_folder_says(told, wanted, folder, tmp_path):
    save_file(beside(folder, tmp_path), tmp_path / "model.safetensors")
    if told is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    found = read_folder(tmp_path).preprocess
    for key, value in wanted.items():
        given = getattr(found, key)
        assert given == (value if key in ("short", "long", "size") else (value,) * 3)
    canvas = read_folder(tmp_path, (96, 160)).preprocess
    assert (canvas.size, canvas.short) == ((96, 160), None)
    assert (canvas.mean, canvas.std) == (found.mean, found.std)


@pytest.mark.parametrize(
    "told",
    [
        {"size": {"height": 640, "width": 640}},
        {"do_resize": False},
        {"resample": 3},
        {"image_mean": [0.5, 0.5]},
        {"image_std": "many"},
        {"size": {"shortest_edge": 800, "longest_edge": 400}},
    ],
)
def test_images_we_do_not_make_are_refused(told, folder, tmp_path):
    save_file(beside(folder, tmp_path), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"preprocessor_config\.json") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "weights-input" and "\n" not in caught.value.message


# Where training code keeps the average, and how it is told from the weights.
def _both(trained, averaged):
    prefixed = {f"module.{name}": x for name, x in averaged.items()}
    return {
        "DINO": {"model": trained, "ema_model": prefixed},
        "DETA": {"model": trained, "model_ema": averaged},
        "timm": {"state_dict": trained, "state_dict_ema": averaged},
        "RT-DETR": {"model": trained, "ema": {"module": averaged, "updates": 7}},
        "detrex": {"model": trained, "ema_state": averaged},
        "plain": {"state_dict": trained, "ema_state_dict": averaged},
    }


@pytest.mark.parametrize("source", _both({}, {}))
def test_averaged_weights_are_chosen_or_named(source, tmp_path):
    trained, averaged = {"a.weight": torch.zeros(2)}, {"a.weight": torch.ones(2)}
    path = tmp_path / "both.pth"
    torch.save(_both(trained, averaged)[source], path)
    found = {choice: read_checkpoint(path, choice) for choice in (None, False, True)}
    for choice, value in ((None, 0), (False, 0), (True, 1)):
        (tensor,) = found[choice].tensors.values()
        assert tensor.tolist() == [value, value]
    assert "--ema takes" in found[None].note
    assert "averaged" in found[True].note.partition(";")[0]
    with pytest.raises(UserError, match="averaged") as caught:
        read_tensors(path)
    assert caught.value.code == "checkpoint-ema"


def test_mmengine_keeps_the_average_in_the_main_place(tmp_path):
    path = tmp_path / "epoch_12.pth"
    content = {
        "meta": {"mmengine_version": "0.10.7", "dataset_meta": {"CLASSES": ("a", "b")}},
        "message_hub": {},
        "state_dict": {"bbox_head.weight": torch.ones(2)},
        "ema_state_dict": {"module.bbox_head.weight": torch.zeros(2), "steps": torch.tensor(7)},
    }
    torch.save(content, path)
    main, raw = read_checkpoint(path), read_checkpoint(path, averaged=False)
    assert main.tensors["bbox_head.weight"].tolist() == [1, 1]
    assert main.note.startswith("state_dict: averaged weights (EMA); --no-ema takes")
    assert main.names == ("a", "b")
    (tensor,) = raw.tensors.values()
    assert tensor.tolist() == [0, 0]


def test_a_file_of_one_model_has_no_other(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"holds no averaged weights") as caught:
        read_checkpoint(path, averaged=True)
    assert caught.value.code == "checkpoint-ema"
    assert read_checkpoint(path, averaged=False).note == ""
    torch.save({"ema_model": {"a": torch.zeros(1)}}, path)
    assert "the only ones" in read_checkpoint(path).note
    assert list(read_tensors(path)) == ["a"]
    with pytest.raises(UserError, match="not averaged"):
        read_checkpoint(path, averaged=False)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod."])
def test_prefixes_of_wrappers(prefix, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({f"{prefix}a.b": torch.zeros(1), f"{prefix}module.c": torch.zeros(1)}, path)
    assert set(read_tensors(path)) == {"a.b", "module.c"}


def test_records_beside_the_weights_are_no_obstacle(tmp_path, monkeypatch):
    place = "mmengine.logging.history_buffer"
    package = types.ModuleType(place)
    package.HistoryBuffer = type("HistoryBuffer", (), {"__module__": place})
    for name in (place, "mmengine.logging", "mmengine"):
        monkeypatch.setitem(sys.modules, name, package)
    record = package.HistoryBuffer()
    record.history = np.arange(3.0)
    path = tmp_path / "x.pth"
    torch.save(
        {
            "state_dict": {"a": torch.ones(1)},
            "message_hub": {"loss": record},
            "meta": {"seed": np.int64(3)},
        },
        path,
    )
    assert list(read_checkpoint(path).tensors) == ["a"]


def headless(source, path, *prefixes):
    tensors = {
        name: x
        for name, x in load_file(source / "model.safetensors").items()
        if not name.startswith(prefixes)
    }
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    "cut", [("class_labels_classifier",), ("class_labels_classifier", "bbox_predictor")]
)
def test_without_heads_it_is_a_start_and_nothing_else(cut, folder, tmp_path):
    beside(folder, tmp_path)
    headless(folder, tmp_path, *cut)
    out = tmp_path / "out.safetensors"
    report = json.loads(convert_cli(tmp_path, "--out", out).stdout)
    assert report["classes"] == 0
    assert any("no class head" in note for note in report["notes"])
    with pytest.raises(UserError, match="no class head") as caught:
        load_model(out)
    assert caught.value.code == "checkpoint-headless"

    whole = read_folder(folder).detector
    detector = build_detector(whole.config.replace(num_classes=2), pretrained=False)
    taken, _ = start(detector, out, ClassMap(names=("a", "b"), category_ids=(1, 2)), {})
    own = {name for name in taken.skipped if not name.endswith("num_batches_tracked")}
    assert {name.rpartition(".")[0].partition(".layers")[0] for name in own} == {
        f"decoder.{head}.0" for head in ("class_heads", "box_heads")[: len(cut)]
    }
    for name, x in detector.state_dict().items():
        assert name in own or name.endswith("tracked") or torch.equal(x, whole.state_dict()[name])


def test_names_of_the_library_s_model_without_heads(folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    found = read_folder(tmp_path)
    assert {name.split(".")[1] for name in found.without} == {"class_heads", "box_heads"}


@pytest.mark.parametrize(
    "arguments",
    [["--ema"], ["--no-ema"], ["--dc5"], ["--initial-boxes", "bitmask"]],
    ids=lambda given: given[0],
)
def test_options_of_files_do_nothing_for_folders(arguments, folder, tmp_path):
    result = convert_cli(folder, "--out", tmp_path / "x.safetensors", *arguments)
    assert result.exit_code == 2 and "error[weights-option]" in result.output
    assert arguments[0].replace("--no-", "--") in result.output
