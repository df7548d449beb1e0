"""Damaged files of weights and configs of any content are told in one line."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from detr.errors import UserError
from detr.models.tensors import read_checkpoint
from detr.models.weights.hugging_face import FAMILIES, config_of, read_folder
from detr.models.weights.renaming import Rule, rename
from tests.models.weights.test_reading import convert_cli, save


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() & transformers.CONFIG_MAPPING.keys()))
def test_a_config_of_any_content_is_one_line(kind):
    told = transformers.CONFIG_MAPPING[kind]().to_dict() | {"model_type": kind}
    inner = told.get("backbone_config") or {}
    refused = 0
    for value in (-1, "x", None, [], {}, ["a"], float("nan")):
        changes = [{key: value} for key in told if key != "model_type"]
        changes += [{"backbone_config": {**inner, key: value}} for key in inner]
        for change in changes:
            try:
                config_of(told | change, 3, "folder")
            except UserError as error:
                refused += error.code == "weights-config"
                assert error.message.startswith("folder: ")
    assert refused > 10


def test_the_value_of_a_config_is_named(tmp_path):
    save("detr", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": "wide"}))
    run = convert_cli(tmp_path, "--out", tmp_path / "w.safetensors")
    assert run.exit_code == 2 and "config.json: d_model: 'wide' is not supported" in run.stderr
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": ["a"]}))
    with pytest.raises(UserError, match="id2label: not a table"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "x.pth: not a checkpoint, or cut off"),
        (b"each line is a word", "x.pth: not a checkpoint"),
    ],
)
def test_what_is_no_pickle_is_said_in_words(content, told, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_checkpoint(tmp_path / "x.pth")
    assert caught.value.code == "checkpoint-unreadable"


def test_what_is_not_finite_is_no_matter_of_copies():
    broken = torch.full((2,), torch.nan)
    rules = (Rule(r"head\.\d\.bias", "head.bias"),)
    with pytest.raises(UserError, match=r"NaN or infinite values in head\.0\.bias") as caught:
        rename({"head.0.bias": broken, "head.1.bias": broken.clone()}, rules, "x")
    assert caught.value.code == "checkpoint-nonfinite"
