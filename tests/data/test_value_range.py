"""Pictures of more than 8 bits: the doctor warns, the data declare their range, 8 bits stay."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr.data import PreprocessConfig, inspect, open_dataset, preprocess
from detr.data.check import check
from detr.data.draw import draw
from detr.data.images import read_image
from detr.errors import UserError

SIZE = (32, 48)


def dataset_of(folder: Path, pictures: dict[str, Image.Image], **switches: Any) -> str:
    (folder / "pictures").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / "pictures" / name)
    images = [
        {"id": k, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for k, name in enumerate(pictures)
    ]
    box = {"category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    document = {
        "images": images,
        "annotations": [{"id": k, "image_id": k, **box} for k in range(1, len(images))]
        + [{"id": 99, "image_id": 0, **box}],
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "labels.json").write_text(json.dumps(document))
    spec = {"format": "coco", "images": "pictures", "annotations": "labels.json", **switches}
    path = folder / "data.yaml"
    path.write_text(json.dumps(spec))
    return str(path)


def fourteen_bits(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(7000, 8201, SIZE, dtype=np.uint16)
    return Image.fromarray(values)


def thermal(folder: Path, **switches: Any) -> str:
    return dataset_of(folder, {f"{k}.png": fourteen_bits(k) for k in range(3)}, **switches)


def test_the_doctor_says_what_is_lost_and_which_range_to_declare(tmp_path: Path) -> None:
    dataset = open_dataset(thermal(tmp_path))
    (found,) = inspect(dataset).findings
    assert (found.severity, found.code) == ("warning", "image-depth")
    assert "3 of 3 images have values from 700" in found.message
    assert "become 6 gray levels of 256; say range: [700" in found.message
    assert check(dataset).findings == [found]
    assert len(np.unique(preprocess([dataset.image(0)], PreprocessConfig(size=SIZE)).images)) < 19


def test_a_declared_range_makes_256_levels_of_it(tmp_path: Path) -> None:
    dataset = open_dataset(thermal(tmp_path, range=[7000, 8200]))
    assert inspect(dataset).findings == [] and dataset.value_range == (7000, 8200)
    image, raw = dataset.image(0), np.asarray(fourteen_bits(0), dtype=np.float64)
    assert image.dtype == np.uint8 and len(np.unique(image)) > 200
    np.testing.assert_array_equal(image[..., 1], np.rint((raw - 7000) / 1200 * 255))


def test_a_range_by_percentiles_is_measured_on_the_data(tmp_path: Path) -> None:
    dataset = open_dataset(thermal(tmp_path, range={"percentiles": [1, 99]}))
    low, high = dataset.value_range or (0, 0)
    assert 7005 < low < 7020 and 8180 < high < 8195
    assert dataset.image(0).min() == 0 and dataset.image(0).max() == 255
    # A model's range goes before a measured one, and not before numbers.
    spec = str(tmp_path / "data.yaml")
    assert open_dataset(spec, value_range=(7000, 8000)).value_range == (7000, 8000)
    spec = thermal(tmp_path, range=[7000, 8200])
    assert open_dataset(spec, value_range=(7000, 8000)).value_range == (7000, 8200)


def test_a_bundle_s_preprocessing_does_the_same_with_raw_values(tmp_path: Path) -> None:
    config = PreprocessConfig(size=SIZE, range=(7000, 8200))
    declared = open_dataset(thermal(tmp_path, range=[7000, 8200])).image(0)
    raw = open_dataset(thermal(tmp_path)).image(0)
    assert raw.dtype == np.uint16
    np.testing.assert_array_equal(
        preprocess([raw], config).images, preprocess([declared], config).images
    )
    assert (read_image(tmp_path / "pictures/0.png", value_range=config.range) == declared).all()
    assert draw(raw, np.zeros((0, 4)), np.zeros(0, np.int64), []).dtype == np.uint8


def test_models_for_8_bits_are_described_as_ever() -> None:
    config = PreprocessConfig(size=SIZE)
    assert set(config.model_dump(mode="json")) == {"size", "mean", "std"}
    ranged = config.model_copy(update={"range": (7000.0, 8200.0)})
    assert PreprocessConfig.model_validate_json(ranged.model_dump_json()) == ranged


def test_floating_point_pictures_need_a_range(tmp_path: Path) -> None:
    kelvin = np.linspace(280, 310, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)
    picture = {"t.tiff": Image.fromarray(kelvin)}
    dataset = open_dataset(dataset_of(tmp_path, picture))
    with pytest.raises(UserError, match=r"values from 280.* to 30.*; say range:") as caught:
        inspect(dataset).stop()
    assert caught.value.code == "image-range" and len(check(dataset).errors) == 1
    with pytest.raises(UserError, match="no black and white"):
        preprocess([dataset.image(0)], PreprocessConfig(size=SIZE))
    ranged = open_dataset(dataset_of(tmp_path, picture, range=[280, 310]))
    assert inspect(ranged).findings == [] and len(np.unique(ranged.image(0))) == 256


@pytest.mark.parametrize("value_range", [[7000, 8200], {"percentiles": [1, 99]}])
def test_a_range_for_pictures_of_8_bits_is_refused(tmp_path: Path, value_range: object) -> None:
    pictures = {"a.png": Image.new("L", SIZE[::-1], 7), "b.png": Image.new("L", SIZE[::-1], 9)}
    dataset = open_dataset(dataset_of(tmp_path, pictures, range=value_range))
    for found in (inspect(dataset), check(dataset)):
        assert [f.code for f in found.errors] == ["image-range"]
    with pytest.raises(UserError, match="8 bits"):
        dataset.image(0)


@pytest.mark.parametrize(
    "value_range", [[8200, 7000], [1, 1], [0, "nan"], [0], "14 bits", {"percentiles": [5, 101]}]
)
def test_a_range_that_is_none(tmp_path: Path, value_range: object) -> None:
    with pytest.raises(UserError) as caught:
        open_dataset(thermal(tmp_path, range=value_range))
    assert caught.value.code == "data-yaml" and "range" in caught.value.message


def test_color_of_16_bits_is_read_by_its_upper_half_and_that_is_said(tmp_path: Path) -> None:
    rows = np.full((*SIZE, 3), 4000, dtype=">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )  # fmt: skip

    spec = dataset_of(tmp_path, {"a.png": Image.new("RGB", SIZE[::-1])})
    (tmp_path / "pictures/a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )  # fmt: skip
    dataset = open_dataset(spec)
    assert dataset.image(0).max() == 15
    assert [f.code for f in inspect(dataset).warnings] == ["image-depth"]
