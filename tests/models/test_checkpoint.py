"""Weights on disk: round trips and refusals."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from detr.config import ClassMap
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models import load_model, save_model


def _info(detector) -> ModelInfo:
    return ModelInfo(
        detector=detector.config,
        classes=ClassMap(names=("a", "b", "c"), category_ids=(1, 2, 3)),
        preprocess=PreprocessConfig(size=(96, 160)),
        provenance={"step": 7},
    )


def _code(path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert "\n" not in caught.value.message
    assert path.name in caught.value.message
    return caught.value.code


@pytest.mark.parametrize("kind", ["plain", "dino", "dino_shared"])
def test_round_trip(kind, make, batch, tmp_path):
    detector = make(kind)
    save_model(tmp_path / "a.safetensors", detector, _info(detector))
    loaded, info = load_model(tmp_path / "a.safetensors")
    assert info == _info(detector)
    assert not loaded.training
    with torch.no_grad():
        for got, want in zip(loaded(*batch), detector(*batch), strict=True):
            assert torch.equal(got, want)


def test_half_precision_round_trip(make, batch, tmp_path):
    detector = make("dino")
    detector.backbone.body.bn1.running_var.fill_(1e6)  # more than 16 bits hold
    detector.decoder.layers[0].ffn.expand.bias.data[0] = 1e6
    save_model(tmp_path, detector, _info(detector), half=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["source.content.weight"].dtype == torch.float16
    assert stored["backbone.body.bn1.running_var"].dtype == torch.float32
    loaded, _ = load_model(tmp_path)
    for name, tensor in loaded.state_dict().items():
        own = detector.state_dict()[name]
        assert tensor.dtype == own.dtype
        torch.testing.assert_close(tensor, own, rtol=1e-3, atol=1e-6)
    assert loaded.decoder.layers[0].ffn.expand.bias[0] == 1e6


def test_a_plain_state_dict_pickle_is_read(make, tmp_path):
    detector = make("plain")
    save_model(tmp_path, detector, _info(detector))
    (tmp_path / "model.json").rename(tmp_path / "b.json")
    torch.save({"model": detector.state_dict()}, tmp_path / "b.pt")
    loaded, _ = load_model(tmp_path / "b.pt")
    assert torch.equal(loaded.source.embedding.weight, detector.source.embedding.weight)


class _Bomb:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped, tmp_path):
    path = tmp_path / "evil.pt"
    content = {"model": {"weight": _Bomb(tmp_path / "ran")}}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert _code(path) == "checkpoint-pickle"
    assert not (tmp_path / "ran").exists()


def test_damaged_and_missing_files(make, tmp_path):
    assert _code(tmp_path / "none.safetensors") == "checkpoint-missing"
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        assert _code(tmp_path / name) == "checkpoint-unreadable"
        (tmp_path / name).write_bytes(b"")
        assert _code(tmp_path / name) == "checkpoint-unreadable"
    detector = make("plain")
    save_model(tmp_path, detector, _info(detector))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert _code(tmp_path / "model.safetensors") == "checkpoint-unreadable"
    torch.save(detector.state_dict(), tmp_path / "cut.pt")
    pickled = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(pickled[: len(pickled) // 2])
    assert _code(tmp_path / "cut.pt") == "checkpoint-unreadable"


def test_weights_without_a_sidecar(make, tmp_path):
    detector = make("plain")
    save_model(tmp_path, detector, _info(detector))
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert caught.value.code == "model-sidecar"


def test_a_mismatch_names_the_tensors(make, tmp_path):
    detector = make("plain")
    save_model(tmp_path, detector, _info(detector))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["source.embedding.weight"] = tensors["source.embedding.weight"][:5].clone()
    tensors["decoder.surplus"] = tensors.pop("source.reference_points.bias")
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert caught.value.code == "checkpoint-mismatch"
    for part in (
        "missing: source.reference_points.bias",
        "unexpected: decoder.surplus",
        "source.embedding.weight is [5, 64] instead of [12, 64]",
    ):
        assert part in caught.value.message


def test_an_unwritable_folder_leaves_nothing(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    detector = make("plain")
    with pytest.raises(UserError) as caught:
        save_model(tmp_path / "file" / "m.safetensors", detector, _info(detector))
    assert caught.value.code == "output-unwritable"
    assert (tmp_path / "file").read_text() == "in the way"


def test_info_of_another_detector_is_a_defect(make, tmp_path):
    with pytest.raises(ValueError, match="not the config"):
        save_model(tmp_path, make("plain"), _info(make("dino")))
