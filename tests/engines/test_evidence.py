"""An artifact is trusted only with evidence beside it that names its very bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr.errors import UserError
from detr.files import sha256
from engines.evidence import (
    EVIDENCE,
    EngineBuild,
    Evidence,
    LayerCount,
    read_evidence,
    trusted_artifact,
)

BUILD = EngineBuild(
    version="10.16.1.11",
    compute_capabilities=(86,),
    precision="fp32",
    lowering="plugin",
    plugin_sha256="p" * 64,
    version_compatible=False,
    hardware_compatible=False,
    batch=(1, 1, 4),
    seconds=3.0,
    bytes=4,
    memory_bytes={"device": 2**21},
    layers=LayerCount(source="engine", count=2),
    not_run_because=None,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.engine").write_bytes(b"code")
    Evidence(
        artifact="model.engine",
        sha256=sha256(tmp_path / "model.engine"),
        bundle_sha256="0" * 64,
        backend="tensorrt",
        status="rejected",
        reasons=("boxes off by 9 px",),
        build=BUILD,
    ).write(tmp_path)
    return tmp_path


def refused(folder: Path) -> UserError:
    with pytest.raises(UserError) as error:
        trusted_artifact(folder)
    assert str(folder) in str(error.value)
    return error.value


def test_what_was_written_is_read(folder: Path) -> None:
    trusted = trusted_artifact(folder)
    evidence = trusted.evidence
    assert (trusted.path, trusted.data) == (folder / "model.engine", b"code")
    assert evidence == read_evidence(folder)
    assert evidence.status == "rejected" and evidence.reasons == ("boxes off by 9 px",)
    assert evidence.build == BUILD


def test_a_changed_artifact_is_not_trusted(folder: Path) -> None:
    (folder / "model.engine").write_bytes(b"codf")
    error = refused(folder)
    assert error.code == "artifact-changed" and "not loaded" in error.message


def test_a_missing_artifact(folder: Path) -> None:
    (folder / "model.engine").unlink()
    assert refused(folder).code == "artifact-missing"


def test_without_evidence_nothing_is_trusted(folder: Path) -> None:
    (folder / EVIDENCE).unlink()
    assert refused(folder).code == "evidence-missing"


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ('"rejected"', '"fine"', "status"),
        ('"artifact"', '"artefactum"', "artefactum: no such key"),
        ("{", "", "file"),
        ('"format": 2', '"format": 3', "format"),
        ('"seconds"', '"minutes"', "build.minutes: no such key"),
    ],
)
def test_damaged_evidence_names_the_place(folder: Path, old: str, new: str, place: str) -> None:
    path = folder / EVIDENCE
    path.write_text(path.read_text().replace(old, new, 1))
    error = refused(folder)
    assert error.code == "evidence-unreadable" and f"{EVIDENCE}: {place}" in error.message


def test_an_artifact_elsewhere_is_not_followed(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    text = (folder / EVIDENCE).read_text()
    (inside / EVIDENCE).write_text(text.replace("model.engine", "../model.engine"))
    assert refused(inside).code == "artifact-missing"
