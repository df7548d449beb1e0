"""Pascal VOC folders: the benchmark's own, labeling programs' and Roboflow's."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from detr.config import ClassMap
from detr.data import inspect, open_dataset
from detr.errors import UserError

OBJECT = """  <object>
    <name>{name}</name>
    <part><bndbox><xmin>1</xmin></bndbox></part>
    {more}
    <bndbox><xmax>{box[2]}</xmax><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><ymax>{box[3]}</ymax></bndbox>
  </object>
"""


def item(name: str = "dog", box: tuple[object, ...] = (11, 21, 60, 50), more: str = "") -> str:
    return OBJECT.format(name=name, box=box, more=more)


def document(*objects: str, database: str = "Unknown", size: tuple[int, int] = (200, 100)) -> str:
    return (
        f"<annotation>\n  <source><database>{database}</database></source>\n"
        f"  <size><width>{size[0]}</width><height>{size[1]}</height></size>\n"
        f"{''.join(objects)}</annotation>\n"
    )


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two images in the benchmark's layout."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for stem, text in {
        "2008_000001": document(item("dog"), item("cat", more="<difficult>1</difficult>")),
        "2008_000002": document(),
    }.items():
        Image.new("RGB", (200, 100)).save(tmp_path / "JPEGImages" / f"{stem}.jpg")
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(text)
    (tmp_path / "ImageSets/Main/val.txt").write_text("2008_000001\n")
    return tmp_path


def test_objects_difficult_ones_and_splits(voc: Path) -> None:
    data = open_dataset(f"voc:{voc}:val")
    assert len(data) == 1 and len(open_dataset(f"voc:{voc}")) == 2
    assert data.classes.names == ("cat", "dog") and data.image_id(0) == "2008_000001"
    labels = data.labels(0)
    assert labels.boxes.tolist() == [[11, 21, 60, 50]] and labels.labels.tolist() == [1]
    assert labels.ignore.tolist() == [[11, 21, 60, 50]] and labels.ignore_labels.tolist() == [0]
    assert inspect(data).findings == [] and data.image_size(0) == (100, 200)
    given = ClassMap(names=("dog", "cat"), category_ids=(4, 9))
    assert open_dataset(f"voc:{voc}:val", given).labels(0).labels.tolist() == [0]
    with pytest.raises(UserError, match="there are: val"):
        open_dataset(f"voc:{voc}:train")


def test_the_benchmark_counts_pixels_from_one(voc: Path) -> None:
    path = voc / "Annotations/2008_000001.xml"
    path.write_text(document(item(), database="The VOC2008 Database"))
    assert open_dataset(f"voc:{voc}:val").labels(0).boxes.tolist() == [[10, 20, 60, 50]]
    spec = voc / "d.yaml"
    spec.write_text("format: voc\npath: .\nsplit: val\nfirst_pixel: 0\n")
    assert open_dataset(str(spec)).labels(0).boxes.tolist() == [[11, 21, 60, 50]]
    path.write_text(document(item()))
    spec.write_text("format: voc\npath: .\nsplit: val\nfirst_pixel: 1\n")
    assert open_dataset(str(spec)).labels(0).boxes.tolist() == [[10, 20, 60, 50]]


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (document(item(name="")), "voc-object", ":4: name is missing"),
        (document(item(), item(box=(1, 2, "x", 4))), "voc-object", ":10: bndbox/xmax is 'x'"),
        (document(item(box=(1, 2, "", 4))), "voc-object", ":4: bndbox/xmax is missing"),
        (document(item(more="<difficult>maybe</difficult>")), "voc-object", "'maybe', not 0 or 1"),
        (document(item(box=(30, 2, 20, 40))), "box-inverted", ":4: box"),
        (document(item(box=(300, 2, 320, 40))), "box-outside", "(200x100)"),
        ("<annotation><object>", "xml-syntax", ":1: not XML"),
        ("", "xml-syntax", ":1: not XML"),
        ("<html></html>", "voc-object", ":1: <html> is no annotation"),
    ],
)
def test_a_bad_file_names_its_line(voc: Path, content: str, code: str, says: str) -> None:
    path = voc / "Annotations/2008_000001.xml"
    path.write_text(content)
    data = open_dataset(f"voc:{voc}:val", ClassMap(names=("dog",), category_ids=(1,)))
    with pytest.raises(UserError) as caught:
        data.labels(0)
    assert caught.value.code == code and says in caught.value.message
    assert str(path) in caught.value.message and inspect(data).errors[0].code == code


def test_sizes_that_are_not_the_picture_s_and_sizes_nobody_knew(voc: Path) -> None:
    path = voc / "Annotations/2008_000001.xml"
    path.write_text(document(item(), size=(400, 200)))
    assert [e.code for e in inspect(open_dataset(f"voc:{voc}:val")).errors] == ["image-size"]
    path.write_text(document(item(), size=(0, 0)))
    data = open_dataset(f"voc:{voc}:val")
    assert inspect(data).findings == [] and data.bounds(0) is None


def test_pairs_with_one_half_missing(voc: Path) -> None:
    (voc / "Annotations/2008_000002.xml").rename(voc / "Annotations/2008_000009.xml")
    codes = sorted(error.code for error in inspect(open_dataset(f"voc:{voc}")).errors)
    assert codes == ["image-missing", "label-missing"]


def test_roboflow_s_layout_and_folders_named_in_a_yaml(voc: Path, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / "rf" / split).mkdir(parents=True)
        Image.new("RGB", (200, 100)).save(tmp_path / "rf" / split / "a.rf.01.jpg")
        (tmp_path / "rf" / split / "a.rf.01.xml").write_text(document(item("van")))
    data = open_dataset(f"voc:{tmp_path / 'rf'}:valid")
    assert inspect(data).findings == [] and data.classes.names == ("van",)
    with pytest.raises(UserError, match="name a split; there are: train, valid"):
        open_dataset(f"voc:{tmp_path / 'rf'}")
    spec = tmp_path / "d.yaml"
    spec.write_text("format: voc\nimages: JPEGImages\nannotations: Annotations\n")
    assert len(open_dataset(str(spec))) == 2
