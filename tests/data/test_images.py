from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr.data.draw import draw
from detr.data.images import read_header, read_image
from detr.data.value_range import to_bytes
from detr.errors import UserError


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_gray_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    gray = saved(tmp_path / "gray.png", Image.new("L", (5, 3), 77))
    palette = saved(tmp_path / "p.png", Image.new("RGB", (5, 3), (9, 200, 30)).convert("P"))
    cmyk = saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (5, 3), (0, 255, 255, 0)))
    assert (read_image(gray) == 77).all() and read_image(gray).shape == (3, 5, 3)
    assert read_image(palette)[0, 0, 1] > 150
    red, green, blue = read_image(cmyk)[1, 1]
    assert red > 220 and green < 40 and blue < 40


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    path = saved(tmp_path / "deep.png", Image.fromarray(deep))
    assert to_bytes(read_image(path), None)[0, :, 0].tolist() == [0, 1, 128, 255]
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    np.testing.assert_array_equal(to_bytes(every, None), np.rint(every / 257))


def test_transparent_pixels_lie_over_black(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    image.putpixel((1, 0), (200, 100, 50, 255))
    assert read_image(saved(tmp_path / "a.png", image))[0].tolist() == [[0, 0, 0], [200, 100, 50]]


def test_exif_rotation_is_applied_to_pixels_and_size(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left half is on top
    for name in ("turned.jpg", "turned.png"):
        path = saved(tmp_path / name, image, exif=exif)
        pixels = read_image(path)
        assert pixels.shape == (40, 20, 3) and read_header(path).size() == (40, 20)
        assert pixels[5].mean() > 240 and pixels[35].mean() < 15
        assert read_image(path, "ignore").shape == (20, 40, 3)
        assert read_header(path).size("ignore") == (20, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"cut.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"cut.{suffix}") as caught:
        read_image(path)
    assert caught.value.code == "image-unreadable"


@pytest.mark.parametrize("content", [b"", b"not a picture at all"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for read in (read_image, read_header):
        with pytest.raises(UserError) as caught:
            read(path)
        assert caught.value.code == "image-unreadable"
        assert caught.value.message.count("x.png") == 1
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "absent.png")
    assert caught.value.code == "image-missing"


def test_draw_leaves_its_input_alone_and_survives_odd_boxes() -> None:
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    boxes = np.array([[10, 20, 40, 50], [70, -9, 200, 300], [30, 30, 20, 20.0]], dtype=np.float32)
    drawn = draw(image, boxes, np.array([0, 1, -1]), ["Car", "Van"], np.array([0.9, 0.5, 0.1]))
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert not image.any() and drawn[50, 10:40].any(axis=-1).all()
    empty = draw(image, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), ["Car"])
    assert not empty.any()


def test_a_picture_of_too_many_pixels_is_refused_in_plain_words(tmp_path: Path) -> None:
    huge = saved(tmp_path / "huge.png", Image.new("1", (20000, 20000)))
    with pytest.raises(UserError, match=r"huge.png: more than \d+ pixels$") as caught:
        read_header(huge)
    assert caught.value.code == "image-unreadable"


def test_names_can_be_read_on_the_color_of_every_class() -> None:
    size = (60, 90)
    for label in range(80):
        gray = np.full((*size, 3), 90, np.uint8)
        name = ["MMMM"] * 80
        drawn = draw(gray, np.array([[5, 30, 60, 50]]), np.array([label]), name)
        strip = drawn[18:30, 5:30].reshape(-1, 3) / 255
        light = (strip**2.2) @ (0.2126, 0.7152, 0.0722)
        assert (light.max() + 0.05) / (light.min() + 0.05) > 4
