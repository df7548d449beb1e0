"""A bundle that is not what was exported is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from detr.errors import UserError
from detr.files import sha256
from detr.types import Detections
from engines import open_bundle, open_engine
from engines.bundle import Golden


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    sidecar = json.loads((folder / "bundle.json").read_text())
    change(sidecar)
    (folder / "bundle.json").write_text(json.dumps(sidecar))


def append_byte(folder: Path) -> None:
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"x")


def external(folder: Path) -> None:
    """Moves the weights to a file beside the folder and mends the hash of the graph."""
    model = onnx.load(str(folder / "model.onnx"))
    onnx.save_model(
        model,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    (folder / "weights.bin").rename(folder.parent / "weights.bin")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rewrite(folder, lambda s: s["files"].update({"model.onnx": sha256(folder / "model.onnx")}))


def garbage(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"not a model")
    rewrite(folder, lambda s: s["files"].update({"model.onnx": sha256(folder / "model.onnx")}))


BROKEN: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "changed file": ("bundle-changed", "model.onnx", append_byte),
    "missing file": ("bundle-missing-file", "golden.npz", lambda f: (f / "golden.npz").unlink()),
    "missing sidecar": ("bundle-sidecar", "bundle.json", lambda f: (f / "bundle.json").unlink()),
    "sidecar cut short": (
        "bundle-sidecar",
        "bundle.json",
        lambda f: (f / "bundle.json").write_text((f / "bundle.json").read_text()[:200]),
    ),
    "misspelt key": (
        "bundle-sidecar",
        "opsett",
        lambda f: rewrite(f, lambda s: s.update(opsett=17)),
    ),
    "newer format": (
        "bundle-sidecar",
        "format",
        lambda f: rewrite(f, lambda s: s.update(format=99)),
    ),
    "graph not listed": (
        "bundle-sidecar",
        "model.onnx",
        lambda f: rewrite(f, lambda s: s["files"].pop("model.onnx")),
    ),
    "file outside": (
        "bundle-outside",
        "../secret",
        lambda f: rewrite(f, lambda s: s["files"].update({"../secret": "0"})),
    ),
    "absolute file": (
        "bundle-outside",
        "/etc/passwd",
        lambda f: rewrite(f, lambda s: s["files"].update({"/etc/passwd": "0"})),
    ),
    "external data outside": ("bundle-external-data", "../weights.bin", external),
    "not an ONNX file": ("bundle-model", "model.onnx", garbage),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bundle_is_refused_in_one_line(name: str, toy_bundle: Callable[..., Path]) -> None:
    code, place, damage = BROKEN[name]
    folder = toy_bundle()
    damage(folder)
    with pytest.raises(UserError) as caught:
        open_engine(folder)
    assert caught.value.code == code
    assert place in caught.value.message
    assert "\n" not in caught.value.message


def test_sound_bundle_opens(toy_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(toy_bundle())
    assert bundle.info.model.classes.names == ("car", "tram")
    assert [image.shape for image in bundle.golden().images] == [(20, 30, 3)]


def test_golden_round_trip(tmp_path: Path, toy_bundle: Callable[..., Path]) -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (h, 9, 3)).astype(np.uint8) for h in (5, 7)]
    found = [
        Detections(
            generator.normal(size=(n, 4)).astype(np.float32),
            generator.uniform(size=n).astype(np.float32),
            np.arange(n),
        )
        for n in (0, 3)
    ]
    folder = toy_bundle()
    (folder / "golden.npz").write_bytes(Golden(images, found).to_bytes())
    rewrite(folder, lambda s: s["files"].update({"golden.npz": sha256(folder / "golden.npz")}))
    back = open_bundle(folder).golden()
    for a, b in zip(images, back.images, strict=True):
        np.testing.assert_array_equal(a, b)
    for x, y in zip(found, back.detections, strict=True):
        np.testing.assert_array_equal(x.boxes, y.boxes)
        np.testing.assert_array_equal(x.labels, y.labels)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such") as caught:
        open_engine(tmp_path / "nothing.bundle")
    assert caught.value.code == "model-missing"
