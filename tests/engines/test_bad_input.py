"""What goes wrong on a target, as its user sees it: one line, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from detr.cli import main
from detr.files import sha256

MakeBundle = Callable[..., Path]


def detr(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def changed_file(bundle: Path) -> None:
    with (bundle / "golden.npz").open("ab") as file:
        file.write(b"!")


def external_data(bundle: Path) -> None:
    path = bundle / "model.onnx"
    weights = {"location": "../w.bin", "save_as_external_data": True, "size_threshold": 0}
    onnx.save_model(onnx.load(str(path)), str(path), **{**weights, "location": "w.bin"})
    (bundle / "w.bin").rename(bundle.parent / "w.bin")
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../w.bin" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    sidecar = json.loads((bundle / "bundle.json").read_text())
    sidecar["files"]["model.onnx"] = sha256(path)
    (bundle / "bundle.json").write_text(json.dumps(sidecar))


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (changed_file, "bundle-changed"),
        (lambda bundle: (bundle / "bundle.json").unlink(), "bundle-sidecar"),
        (external_data, "bundle-external-data"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("predict", "{bundle}", "{image}"),
        ("bench", "run", "{bundle}", "--data", "kitti:nowhere"),
        ("export", "triton", "{bundle}", "--out", "{out}"),
        ("export", "cpp", "{bundle}", "--out", "{out}"),
    ],
    ids=lambda command: "-".join(command[:2]) if isinstance(command, tuple) else None,
)
def test_a_bundle_that_is_not_what_was_exported(
    toy_bundle: MakeBundle, tmp_path: Path, damage: Any, code: str, command: tuple[str, ...]
) -> None:
    bundle = toy_bundle()
    damage(bundle)
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    words = {"bundle": bundle, "image": tmp_path / "i.png", "out": tmp_path / "out"}
    run = detr(*(word.format(**words) for word in command))
    assert run.exit_code == 2, run.output
    assert run.stderr.startswith(f"error[{code}]: ") and run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), (90, 90, 90)).save(path, exif=exif)


PICTURES: dict[str, tuple[Any, tuple[int, int]]] = {
    "gray.png": (lambda path: Image.new("L", (40, 20), 90).save(path), (40, 20)),
    "alpha.png": (lambda path: Image.new("RGBA", (40, 20), (90, 90, 90, 255)).save(path), (40, 20)),
    "deep.png": (
        lambda path: Image.fromarray(np.full((20, 40), 90 * 257, np.uint16)).save(path),
        (40, 20),
    ),
    "cmyk.jpg": (lambda path: Image.new("CMYK", (40, 20), (0, 0, 0, 165)).save(path), (40, 20)),
    "turned.jpg": (turned, (20, 40)),
    "one.png": (lambda path: Image.new("RGB", (1, 1), (90, 90, 90)).save(path), (1, 1)),
}


def test_pictures_of_every_kind_are_read_the_same(toy_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = toy_bundle()
    for name, (save, _) in PICTURES.items():
        save(tmp_path / name)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (40, 20), (90, 90, 90)).save(plain)
    paths = [plain, *(tmp_path / name for name in PICTURES)]
    run = detr("predict", bundle, *paths, "--json", "--score", "0")
    assert run.exit_code == 0, run.output
    expected, *found = json.loads(run.stdout)["predictions"]
    for (name, (_, size)), one in zip(PICTURES.items(), found, strict=True):
        assert (one["width"], one["height"]) == size, name
        assert len(one["detections"]) == len(expected["detections"])
        boxes = np.array([d["box"] for d in one["detections"]])
        assert np.isfinite(boxes).all()
        if size == (40, 20):
            # A gray of 90 in every mode: CMYK and JPEG round by a level or two.
            wanted = np.array([d["box"] for d in expected["detections"]])
            np.testing.assert_allclose(boxes, wanted, atol=0.5, err_msg=name)


def test_a_batch_larger_than_the_export_names_both(toy_bundle: MakeBundle) -> None:
    from detr.errors import UserError
    from engines import open_engine

    engine = open_engine(toy_bundle(2), "onnxruntime")
    with pytest.raises(UserError) as caught:
        engine([np.zeros((8, 8, 3), np.uint8)] * 3)
    assert caught.value.code == "batch-too-large"
    assert "3 images" in caught.value.message and "for 2" in caught.value.message
    assert "\n" not in caught.value.message
