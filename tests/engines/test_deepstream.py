"""DeepStream: the graph takes nvinfer's frames, and the parser finds every frame's detections."""

from __future__ import annotations

import configparser
import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

from detr.data.preprocess import fit, preprocess
from engines.bundle import Bundle
from engines.open import open_engine
from export.cli import main
from export.deploy.deepstream import PARSER, frames_to_detections

MakeBundle = Callable[..., Path]
HERE = Path(__file__).parent
FRAME = (20, 36)  # fits the canvas of 32 x 48 as 27 x 48
Array = np.ndarray[Any, np.dtype[Any]]


def frames(count: int) -> list[Array]:
    generator = np.random.default_rng(4)
    return [generator.integers(0, 256, (*FRAME, 3), np.uint8) for _ in range(count)]


def as_nvinfer_scales(bundle: Bundle, images: list[Array]) -> Array:
    """RGB from 0 to 255, scaled to fit as the package scales, black on the right and below."""
    config = bundle.info.model.preprocess
    plain = config.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    return preprocess(images, plain).images


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("count", [1, 4])
def test_the_graph_finds_what_the_bundle_finds(sized_bundle: Bundle, count: int) -> None:
    images = frames(count)
    model = frames_to_detections(sized_bundle, FRAME)
    assert [i.name for i in model.graph.input] == ["frames"]
    assert [o.name for o in model.graph.output] == ["detections"]
    (found,) = session(model).run(None, {"frames": as_nvinfer_scales(sized_bundle, images)})
    engine = open_engine(sized_bundle, "onnxruntime")
    inputs = engine.prepare(images)
    wanted = engine.run(inputs)
    assert found.shape == (count, 5, 6) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., 4], wanted.scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[..., 5], wanted.labels)
    # From pixels of the frame to pixels of the canvas.
    height, width = fit(*FRAME, (32, 48))
    # (The hand-written graph multiplies x by the height.)
    scale = np.array([height / FRAME[0], width / FRAME[1]] * 2)
    assert (height, width) == (27, 48)
    np.testing.assert_allclose(found[..., :4], wanted.boxes * scale, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("parser") / "parser.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{HERE}"]
    sources = [str(PARSER / "parser.cpp"), str(HERE / "nvinfer.cpp")]
    subprocess.run([*command, *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def parsed(
    parser: ctypes.CDLL, output: Array, frame: int, threshold: float = 0.3, kind: int = 0
) -> list[tuple[float, ...]] | None:
    """Class, left, top, width, height and score of what is found in a frame of a batch."""
    objects = np.zeros((output.shape[1], 6))
    count = parser.parse(
        output.ctypes.data_as(ctypes.c_void_p), frame, *output.shape[1:], kind, 48, 32, 2,
        ctypes.c_float(threshold), objects.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    return None if count < 0 else [tuple(row) for row in objects[:count].tolist()]


def test_every_frame_of_a_batch_has_its_own(sized_bundle: Bundle, parser: ctypes.CDLL) -> None:
    """Elsewhere the first frame's alone were found, and the others were empty."""
    images = frames(4)
    (output,) = session(frames_to_detections(sized_bundle, FRAME)).run(
        None, {"frames": as_nvinfer_scales(sized_bundle, images)}
    )
    # The hand-written graph knows one class, and no order of corners.
    output[..., 5] = np.arange(5) % 2
    output[..., 2:4] = output[..., :2] + np.arange(1, 5)[:, None, None]
    output[..., 4] = np.linspace(0.9, 0.1, 20).reshape(4, 5)
    for frame in range(4):
        found = parsed(parser, output, frame, threshold=0.0)
        assert found, f"frame {frame} is empty"
        inside = np.clip(output[frame][:, :4], 0, [48, 32, 48, 32])
        seen = (inside[:, 2:] > inside[:, :2]).all(1)
        rows, boxes = output[frame][seen], inside[seen]
        assert len(found) == len(rows)
        for (label, left, top, width, height, score), row, box in zip(
            found, rows, boxes, strict=True
        ):
            assert (label, score) == (row[5], pytest.approx(row[4]))
            np.testing.assert_allclose([left, top, left + width, top + height], box, atol=1e-4)
    first, last = (parsed(parser, output, frame, threshold=0.5) for frame in (0, 3))
    assert first and last == []


def test_what_is_no_detection_is_left_out(parser: ctypes.CDLL) -> None:
    good = [1.0, 2.0, 11.0, 22.0, 0.9, 1.0]
    bad = [
        [1, 2, 11, 22, 0.2, 1],  # scores too little
        [1, 2, 11, 22, np.nan, 1],
        [1, 2, 11, 22, 0.9, 2],  # no such class
        [1, 2, 11, 22, 0.9, -1],
        [1, 2, 11, 22, 0.9, np.nan],
        [11, 2, 1, 22, 0.9, 0],  # inside out
        [60, 2, 70, 22, 0.9, 0],  # beyond the network's input
        [np.nan, 2, 11, 22, 0.9, 0],
    ]
    output = np.array([[good, *bad]], np.float32)
    assert parsed(parser, output, 0) == [
        (1.0, 1.0, 2.0, 10.0, 20.0, pytest.approx(0.9)),
    ]
    assert parsed(parser, output, 0, kind=1) is None, "half precision read as float32"
    assert parsed(parser, output[..., :5].copy(), 0) is None, "another layout"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["deepstream", *map(str, arguments)], catch_exceptions=False)


def test_what_is_written(toy_bundle: MakeBundle, sized_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "deepstream"
    result = run(sized_bundle.path, "--out", out, "--frame", "20x36", "--batch", 4)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} >= {
        "config_infer.txt", "labels.txt", "model.onnx", "parser.cpp", "CMakeLists.txt",
    }  # fmt: skip
    assert (out / "labels.txt").read_text() == "car\ntram\n"
    config = configparser.ConfigParser()
    config.read(out / "config_infer.txt")
    settings = config["property"]
    assert settings["infer-dims"] == "3;32;48" and settings["batch-size"] == "4"
    assert settings["num-detected-classes"] == "2" and settings["cluster-mode"] == "4"
    assert settings["maintain-aspect-ratio"] == "1" and settings["symmetric-padding"] == "0"
    assert settings["network-mode"] == "0" and settings["onnx-file"] == "model.onnx"
    assert f'extern "C" bool {settings["parse-bbox-func-name"]}' in (out / "parser.cpp").read_text()
    assert "trtexec" not in (out / "config_infer.txt").read_text()
    model = onnx.load(str(out / "model.onnx"))
    assert not model.functions and "GridSample" not in {node.op_type for node in model.graph.node}
    (found,) = session(model).run(None, {"frames": as_nvinfer_scales(sized_bundle, frames(2))})
    assert found.shape == (2, 5, 6)


def test_half_precision_keeps_the_graphs_types(sized_bundle: Bundle, tmp_path: Path) -> None:
    """nvinfer builds networks whose types the builder may change."""
    from dataclasses import replace

    from export.deploy.deepstream import config_text

    half = replace(sized_bundle, info=sized_bundle.info.model_copy(update={"precision": "fp16"}))
    text = config_text(half, 4, 0.3)
    assert "network-mode=2" in text and "trtexec --onnx=model.onnx --stronglyTyped" in text
    assert "--maxShapes=frames:4x3x32x48" in text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--frame", "1080"], "size-form"), (["--frame", "0x36"], "size-form")],
)
def test_mistakes_are_told(
    sized_bundle: Bundle, tmp_path: Path, arguments: list[str], code: str
) -> None:
    result = run(sized_bundle.path, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2 and f"error[{code}]" in result.stderr


def test_a_fixed_batch_stays(toy_bundle: MakeBundle, tmp_path: Path) -> None:
    path = toy_bundle(batch=1)
    result = run(path, "--out", tmp_path / "out", "--batch", 4)
    assert result.exit_code == 2 and "error[option-batch]" in result.stderr


def test_tensorrt_rtx_takes_the_graph(sized_bundle: Bundle, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from engines.trt.log import Log, make_logger

    logger = make_logger(trt, Log())
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    model = frames_to_detections(sized_bundle, FRAME)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    assert network.num_inputs == network.num_outputs == 1
