"""The model repository, its configuration parsed by protobuf against Triton's field names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
)

from detr.data.preprocess import preprocess
from detr.errors import UserError
from detr.files import sha256
from engines.bundle import Bundle, open_bundle
from engines.evidence import Evidence
from export.bundle import export_bundle
from export.cli import main
from export.deploy.triton import write_repository

INT64, INT32, UINT32, STRING, ENUM, MESSAGE = 3, 5, 13, 9, 14, 11
# What is used of Triton's model_config.proto: message -> field -> (number, type, repeated).
SCHEMA: dict[str, dict[str, tuple[int, Any, bool]]] = {
    "Tensor": {"name": (1, STRING, False), "data_type": (2, "DataType", False)},
    "ModelInput": {
        "name": (1, STRING, False), "data_type": (2, "DataType", False), "dims": (4, INT64, True),
    },
    "ModelOutput": {
        "name": (1, STRING, False), "data_type": (2, "DataType", False), "dims": (3, INT64, True),
    },
    "ModelInstanceGroup": {"kind": (4, "Kind", False), "count": (2, INT32, False)},
    "ModelDynamicBatching": {"preferred_batch_size": (1, INT32, True)},
    "WarmupInput": {
        "data_type": (1, "DataType", False), "dims": (2, INT64, True),
        "input_data_file": (5, STRING, False),
    },
    "InputsEntry": {"key": (1, STRING, False), "value": (2, "WarmupInput", False)},
    "ModelWarmup": {
        "name": (1, STRING, False), "batch_size": (2, UINT32, False),
        "inputs": (3, "InputsEntry", True), "count": (4, UINT32, False),
    },
    "ModelConfig": {
        "name": (1, STRING, False), "backend": (17, STRING, False),
        "max_batch_size": (4, INT32, False), "input": (5, "ModelInput", True),
        "output": (6, "ModelOutput", True), "instance_group": (7, "ModelInstanceGroup", True),
        "default_model_filename": (8, STRING, False),
        "dynamic_batching": (11, "ModelDynamicBatching", False),
        "model_warmup": (16, "ModelWarmup", True),
    },
}  # fmt: skip
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_FP32", "TYPE_INT64"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU"],
}


def parse(path: Path) -> Any:
    """Protobuf's own reader of its text format; a field Triton does not have is an error."""
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="t", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            added = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                added.type, added.type_name = ENUM if kind in ENUMS else MESSAGE, f".t.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))()
    return text_format.Parse(path.read_text(), config)


@pytest.fixture(scope="module")
def bundles(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    source = checkpoint("dino-no-encoder")
    return {
        batch: export_bundle(source, folder / f"b{batch}.bundle", 17, number)
        for batch, number in (("dynamic", "dynamic"), ("2", 2))
    }


@pytest.mark.slow
def test_a_dynamic_batch_is_batched_by_triton(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    made = write_repository(bundles["dynamic"], tmp_path, max_batch=6)
    config = parse(made.folder / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("bdynamic", "onnxruntime", 6)
    assert config.HasField("dynamic_batching")
    assert [(t.name, list(t.dims)) for t in config.input] == [
        ("images", [3, 64, 96]), ("valid_sizes", [2]), ("original_sizes", [2]),
    ]  # fmt: skip
    assert [(t.name, list(t.dims), t.data_type) for t in config.output] == [
        ("boxes", [20, 4], 1), ("scores", [20], 1), ("labels", [20], 2),
    ]  # fmt: skip
    assert sha256(made.folder / "1/model.onnx") == sha256(bundles["dynamic"].model)
    assert (made.folder / "labels.txt").read_text() == "a\nb\nc\n"
    assert json.loads((made.folder / "1/bundle.json").read_text())["batch"] == "dynamic"


@pytest.mark.slow
def test_warm_up_is_the_golden_image_as_it_is_prepared(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    made = write_repository(bundles["2"], tmp_path)
    config = parse(made.folder / "config.pbtxt")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [2, 3, 64, 96]
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1 and warmup.count == 2
    bundle = bundles["2"]
    expected = preprocess(bundle.golden().images[:1], bundle.info.model.preprocess).images
    for entry in warmup.inputs:
        data = np.fromfile(made.folder / "warmup" / entry.value.input_data_file, np.float32)
        assert data.size == np.prod(entry.value.dims)
        if entry.key == "images":
            np.testing.assert_array_equal(data.reshape(2, *expected.shape[1:])[1], expected[0])


@pytest.mark.slow
def test_masks_are_an_output_that_the_sidecar_explains(
    masks_bundle: Bundle, tmp_path: Path
) -> None:
    made = write_repository(masks_bundle, tmp_path)
    outputs = parse(made.folder / "config.pbtxt").output
    assert (outputs[3].name, list(outputs[3].dims), outputs[3].data_type) == (
        "masks", [20, 16, 24], 1,
    )  # fmt: skip
    told = json.loads((made.folder / "1/bundle.json").read_text())["masks"]
    assert told == {"stride": 4, "enlarge": "bilinear", "threshold": 0.5, "margin": 0.25}


@pytest.mark.slow
def test_a_second_export_is_a_second_version(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    assert write_repository(bundles["2"], tmp_path, name="road").version == 1
    assert write_repository(bundles["2"], tmp_path, name="road").version == 2
    assert (tmp_path / "road/2/model.onnx").exists()
    with pytest.raises(UserError) as caught:
        write_repository(bundles["dynamic"], tmp_path, name="road")
    assert caught.value.code == "triton-differs"
    with pytest.raises(UserError) as caught:
        write_repository(bundles["2"], tmp_path, name="a/b")
    assert caught.value.code == "triton-name"


BUILD = json.loads((Path(__file__).parents[2] / "engines/format1/engine-evidence.json").read_text())
BUILD = BUILD["build"]


def add_engine(bundle: Bundle, name: str, **changes: Any) -> Path:
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True)
    (folder / "model.engine").write_bytes(name.encode())
    fields: dict[str, Any] = {
        "artifact": "model.engine", "sha256": sha256(folder / "model.engine"),
        "bundle_sha256": bundle.info.fingerprint, "backend": "tensorrt",
        "status": "accepted", "build": {**BUILD, "batch": [1, 2, 4]},
    }  # fmt: skip
    Evidence(**fields | changes).write(folder)
    return folder


@pytest.mark.slow
def test_engines_are_served_where_they_are_trusted(checkpoint: Any, tmp_path: Path) -> None:
    path = tmp_path / "e.bundle"
    export_bundle(checkpoint("dino-no-encoder"), path, 17, "dynamic")
    bundle = open_bundle(path)
    add_engine(bundle, "tensorrt-rtx-sm86-fp32", backend="tensorrt-rtx")
    bad = add_engine(bundle, "tensorrt-sm80-fp32", status="rejected", reasons=("3 missing",))
    assert write_repository(bundle, tmp_path / "r0").backend == "onnxruntime"
    good = add_engine(bundle, "tensorrt-sm86-fp32")
    made = write_repository(bundle, tmp_path / "r1")
    config = parse(made.folder / "config.pbtxt")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert config.instance_group[0].kind == 1
    assert (made.folder / "1/model.plan").read_bytes() == b"tensorrt-sm86-fp32"
    add_engine(bundle, "tensorrt-sm89-fp32")
    for engine, code in (
        (None, "triton-engine"),
        ("tensorrt-rtx-sm86-fp32", "triton-engine"),
        (bad.name, "engine-rejected"),
        ("tensorrt-sm99-fp32", "evidence-missing"),
    ):
        with pytest.raises(UserError) as caught:
            write_repository(bundle, tmp_path / "r2", engine)
        assert caught.value.code == code
    (good / "model.engine").write_bytes(b"something else")
    with pytest.raises(UserError) as caught:
        write_repository(bundle, tmp_path / "r2", good.name)
    assert caught.value.code == "artifact-changed"
    assert not (tmp_path / "r2").exists()


@pytest.mark.slow
def test_command_line(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    command = ["triton", str(bundles["2"].path), "--out", str(tmp_path / "models"), "--json"]
    run = CliRunner().invoke(main, command)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["version"] == 1
