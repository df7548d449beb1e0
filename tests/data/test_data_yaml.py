"""A data YAML says one thing, and says it clearly."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr.data import open_dataset
from detr.data.check import check
from detr.data.synth import generate
from detr.errors import UserError


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("format: coco\nformat: kitti\npath: .\n", "data.yaml:2: key 'format' appears twice"),
        ("format: kitti\npath: .\nclasses: {Car: []}\nignore: [Car]\n", "ignore: 'Car' is asked"),
        (
            "format: kitti\npath: .\nclasses: {Vehicle: [Van]}\nignore: ['*', Van]\n",
            "ignore: 'Van' is asked for in classes as well",
        ),
        ("format: kitti\npath: .\nclasses: {'': [Car]}\n", "classes"),
        ("format: kitti\npath: .\nignore: '*'\n", "data.yaml: ignore: expected a list"),
        ("format: kitti\npath: .\ndrop: box-outside\n", "data.yaml: drop: expected a list"),
        ("format: kitti\npath: .\nrange: [5, 1]\n", "data.yaml: range: 5 is not below 1"),
        ("format: kitti\npath: 3\n", "data.yaml: path: expected a path"),
        ("format: [kitti\n", "data.yaml:2: "),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, text: str, told: str) -> None:
    generate(tmp_path, 4, (64, 96), 0, "kitti", 0.5)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        open_dataset(str(tmp_path / "data.yaml"))
    assert caught.value.code == "data-yaml" and told in caught.value.message


def test_words_stay_words(tmp_path: Path) -> None:
    """Lights are on and off, which YAML 1.1 takes for truth."""
    generate(tmp_path, 4, (64, 96), 0, "kitti", 0.5)
    yaml = tmp_path / "data.yaml"
    yaml.write_text("format: kitti\npath: .\nclasses: {on: [Car], off: [Nix]}\nignore: ['*']\n")
    dataset = open_dataset(str(yaml))
    assert dataset.classes.names == ("on", "off")
    warned = [one for one in check(dataset).warnings if one.code == "class-unused"]
    assert [one.message for one in warned] == [f"{yaml}: no object of off"]


def test_a_list_may_leave_suffixes_out(tmp_path: Path) -> None:
    generate(tmp_path, 4, (64, 96), 0, "kitti", 0.5)
    whole = open_dataset(f"kitti:{tmp_path}")
    names = [whole.image_path(i) for i in range(len(whole))]
    (tmp_path / "only.txt").write_text(f"{names[2].stem}\n{names[0].name}\n")
    (tmp_path / "data.yaml").write_text("format: kitti\npath: .\nonly: only.txt\n")
    some = open_dataset(str(tmp_path / "data.yaml"))
    assert [some.image_path(i) for i in range(len(some))] == [names[2], names[0]]
