"""The C++ sample prepares the package's input and, with ONNX Runtime's headers, finds the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from detr.config import ClassMap
from detr.data.preprocess import PreprocessConfig, preprocess
from detr.errors import UserError
from detr.mask_scaling import MaskScaling, image_masks
from detr.masks import Rle, overlap
from detr.types import ImageArray
from export.deploy.cpp import c_string, write_sample
from export.deploy.triton import write_repository

CLASSES = ("Car", 'say "tram"?', "Fußgänger")
CONFIG = PreprocessConfig(size=(60, 100), mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.4))


# As in a bundle for one orientation at the papers' sizes.
PAPERS = PreprocessConfig(short=50, long=90, size=(64, 96))


def fake_bundle(
    path: Path,
    config: PreprocessConfig = CONFIG,
    nms: float | None = None,
    masks: MaskScaling | None = None,
) -> Any:
    """As much of a bundle as the sample's sources are made of."""
    model = SimpleNamespace(
        preprocess=config,
        classes=ClassMap(names=CLASSES, category_ids=(1, 2, 3)),
        nms=nms,
    )
    info = SimpleNamespace(
        model=model, batch="dynamic", files={"model.onnx": "ab" * 32}, masks=masks
    )
    if masks is not None:
        cells = [1, 4, *(-(-size // masks.stride) for size in config.size or ())]
        value = helper.make_tensor_value_info("masks", TensorProto.FLOAT, cells)
        graph = helper.make_graph([], "masks", [], [value])
        path.mkdir()
        onnx.save(helper.make_model(graph), str(path / "model.onnx"))
    return SimpleNamespace(path=path, info=info, model=path / "model.onnx")


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(scope="module")
def dump(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dumping(compiler, tmp_path_factory.mktemp("sample"), CONFIG)


@pytest.fixture(scope="module")
def dump_papers(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dumping(compiler, tmp_path_factory.mktemp("papers"), PAPERS)


def dumping(compiler: str, folder: Path, config: PreprocessConfig) -> Path:
    """The program that writes what the sample feeds a network."""
    write_sample(fake_bundle(folder / "x.bundle", config), folder, "onnxruntime")
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    subprocess.run(
        [*command, str(folder / "dump_input.cpp"), "-o", str(folder / "dump")], check=True
    )
    return folder / "dump"


@pytest.mark.parametrize(
    ("height", "width"),
    [(75, 248), (60, 100), (30, 50), (200, 40), (1, 1), (3, 500), (61, 100), (60, 101)],
)
@pytest.mark.parametrize("suffix", ["ppm", "bmp"])
def test_input_is_the_packages(
    dump: Path, tmp_path: Path, height: int, width: int, suffix: str
) -> None:
    generator = np.random.default_rng(height * 1000 + width)
    image = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
    image[: height // 2] = generator.integers(0, 256, 3)
    Image.fromarray(image).save(tmp_path / f"i.{suffix}")
    subprocess.run([dump, tmp_path / f"i.{suffix}", tmp_path / "out"], check=True)
    same_input(tmp_path / "out", image, CONFIG)


# Landscape, the short side reached; bounded by the long side, which rounding exceeds; portrait,
# which the canvas bounds; already of the size.
@pytest.mark.parametrize(
    ("height", "width"), [(75, 100), (60, 240), (20, 192), (100, 75), (50, 70), (64, 64), (200, 31)]
)
def test_input_at_the_papers_sizes_is_the_packages(
    dump_papers: Path, tmp_path: Path, height: int, width: int
) -> None:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "i.ppm")
    subprocess.run([dump_papers, tmp_path / "i.ppm", tmp_path / "out"], check=True)
    same_input(tmp_path / "out", image, PAPERS)


def same_input(path: Path, image: ImageArray, config: PreprocessConfig) -> None:
    found = np.fromfile(path, np.float32)
    expected = preprocess([image], config)
    np.testing.assert_allclose(found[:-4], expected.images.ravel(), rtol=0, atol=1e-5)
    assert found[-4:].tolist() == [*expected.valid_sizes[0], *expected.original_sizes[0]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"P6\n4 4\n255\n" + bytes(10), "cut short"),
        (b"P6\n4 4\n65535\n" + bytes(96), "8 bits"),
        (b"\x89PNG", "neither"),
        (b"BM" + bytes(20), "cut short"),
        (b"", "neither"),
    ],
)
def test_bad_images_are_one_line(dump: Path, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.ppm").write_bytes(content)
    run = subprocess.run(
        [dump, tmp_path / "x.ppm", tmp_path / "out"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert said in run.stderr and "x.ppm" in run.stderr and run.stderr.count("\n") == 1


def test_a_comment_in_a_ppm_header_is_skipped(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ppm").write_bytes(b"P6 # made by hand\n2 1\n# deep\n255\n" + bytes(6))
    subprocess.run([dump, tmp_path / "x.ppm", tmp_path / "out"], check=True)
    assert np.fromfile(tmp_path / "out", np.float32)[-2:].tolist() == [1, 2]


def test_names_survive_as_string_literals(compiler: str, tmp_path: Path) -> None:
    write_sample(fake_bundle(tmp_path / "x.bundle"), tmp_path, "tensorrt")
    (tmp_path / "names.cpp").write_text(
        '#include <cstdio>\n#include "model_info.hpp"\n'
        "int main() { for (const char* n : model_info::kClasses) std::puts(n); }\n"
    )
    subprocess.run(
        [compiler, "-std=c++17", str(tmp_path / "names.cpp"), "-o", str(tmp_path / "n")], check=True
    )
    out = subprocess.run([tmp_path / "n"], capture_output=True, check=True).stdout
    assert tuple(out.decode().splitlines()) == CLASSES
    assert c_string("a??/b") == '"a\\077\\077/b"'
    assert (tmp_path / "detector_tensorrt.cpp").exists()
    assert "NvInfer.h" in (tmp_path / "CMakeLists.txt").read_text()


MASK_PROGRAM = """
#include <cstdio>
#include <fstream>
#include <vector>
#include "masks.hpp"
// Reads valid and original size, boxes and logits of four masks; prints their run lengths.
int main(int, char** argv) {
  std::ifstream file(argv[1], std::ios::binary);
  const auto floats = [&file](std::size_t count) {
    std::vector<float> data(count);
    file.read(reinterpret_cast<char*>(data.data()), count * sizeof(float));
    return data;
  };
  const auto sizes = floats(4), boxes = floats(16);
  Input input;
  input.valid_size = {sizes[0], sizes[1]};
  input.original_size = {sizes[2], sizes[3]};
  const std::size_t cells = std::size_t{1} * model_info::kMaskHeight * model_info::kMaskWidth;
  const auto logits = floats(4 * cells);
  for (int k = 0; k < 4; ++k) {
    const Mask mask = enlarged(logits.data() + k * cells, boxes.data() + 4 * k, input);
    std::puts(run_lengths(mask).c_str());
  }
}
"""


@pytest.mark.parametrize(
    "scaling", [MaskScaling(), MaskScaling(threshold=0.7, margin=0.0)], ids=["usual", "other"]
)
def test_masks_are_the_packages(compiler: str, tmp_path: Path, scaling: MaskScaling) -> None:
    write_sample(fake_bundle(tmp_path / "x.bundle", masks=scaling), tmp_path, "onnxruntime")
    (tmp_path / "masks.cpp").write_text(MASK_PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    subprocess.run(
        [*command, str(tmp_path / "masks.cpp"), "-o", str(tmp_path / "masks")], check=True
    )
    generator = np.random.default_rng(3)
    for size in ((75, 248), (33, 40), (60, 100)):
        valid = preprocess([np.zeros((*size, 3), np.uint8)], CONFIG).valid_sizes
        # Noise of a few cells, one that fills everything, and one that is empty.
        logits = generator.normal(size=(4, 15, 25)).astype(np.float32)
        logits[2], logits[3] = 9.0, -9.0
        boxes = np.array(
            [[0, 0, *size[::-1]], [3.2, 4.9, 21.5, 20], [-5, -5, 500, 500], [0, 0, 9, 9]],
            np.float32,
        )
        parts = (valid, np.array(size, np.float32), boxes, logits)
        (tmp_path / "in").write_bytes(b"".join(part.astype(np.float32).tobytes() for part in parts))
        run = subprocess.run([tmp_path / "masks", tmp_path / "in"], capture_output=True, check=True)
        inside = float(valid[0, 0]), float(valid[0, 1])
        wanted = image_masks(logits, boxes, inside, size, scaling)
        assert wanted[0].area and wanted[1].area and not wanted[3].area
        assert run.stdout.decode().splitlines() == [mask.counts for mask in wanted]


# Declarations as NVIDIA publishes them for TensorRT 10 and 11 and for CUDA, of what is called.
TENSORRT_HEADER = """
#pragma once
#include <cstddef>
#include <cstdint>
struct CUstream_st;
using cudaStream_t = CUstream_st*;
namespace nvinfer1 {
using AsciiChar = char;
class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
  virtual ~ILogger() = default;
};
class Dims64 {
 public:
  static constexpr int32_t MAX_DIMS{8};
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
using Dims = Dims64;
class IExecutionContext {
 public:
  virtual ~IExecutionContext() noexcept = default;
  bool setTensorAddress(char const* tensorName, void* data) noexcept;
  bool setInputShape(char const* tensorName, Dims const& dims) noexcept;
  Dims getTensorShape(char const* tensorName) const noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;
};
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC };
class ICudaEngine {
 public:
  virtual ~ICudaEngine() noexcept = default;
  IExecutionContext* createExecutionContext(
      ExecutionContextAllocationStrategy strategy =
          ExecutionContextAllocationStrategy::kSTATIC) noexcept;
};
class IRuntime {
 public:
  virtual ~IRuntime() noexcept = default;
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept;
};
IRuntime* createInferRuntime(ILogger& logger) noexcept;
}  // namespace nvinfer1
"""
CUDA_HEADER = """
#pragma once
#include <cstddef>
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError { cudaSuccess = 0 };
using cudaError_t = cudaError;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
cudaError_t cudaMalloc(void** devPtr, std::size_t size);
cudaError_t cudaFree(void* devPtr);
cudaError_t cudaMemcpyAsync(void* dst, const void* src, std::size_t count, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaStreamCreate(cudaStream_t* pStream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
const char* cudaGetErrorString(cudaError_t error);
"""


@pytest.mark.parametrize("masks", [False, True])
def test_tensorrt_flavour_compiles_against_published_declarations(
    compiler: str, tmp_path: Path, masks: bool
) -> None:
    """TensorRT's own headers come with no wheel; that it runs is for a machine that has them."""
    bundle = fake_bundle(tmp_path / "x.bundle", masks=MaskScaling() if masks else None)
    write_sample(bundle, tmp_path, "tensorrt")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInfer.h").write_text(TENSORRT_HEADER)
    (tmp_path / "include" / "cuda_runtime_api.h").write_text(CUDA_HEADER)
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for source in ("detector_tensorrt.cpp", "main.cpp"):
        subprocess.run([*command, f"-I{tmp_path / 'include'}", str(tmp_path / source)], check=True)


@pytest.mark.parametrize("detector", ["dino-no-encoder", "dino-masks"])
def test_sample_finds_what_onnx_runtime_finds(
    compiler: str, checkpoint: Any, tmp_path: Path, detector: str
) -> None:
    """Needs ONNX Runtime's headers and library, which no wheel carries together."""
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", "/usr"))
    header = next(root.glob("include/**/onnxruntime_cxx_api.h"), None)
    library = next(root.glob("lib*/**/libonnxruntime.so*"), None)
    if header is None or library is None:
        pytest.skip("no headers of ONNX Runtime; set ONNXRUNTIME_ROOT")
    from engines import open_engine
    from export.bundle import export_bundle

    bundle = export_bundle(checkpoint(detector), tmp_path / "x.bundle", 17, 1)
    write_sample(bundle, tmp_path, "onnxruntime")
    sources = [str(tmp_path / name) for name in ("main.cpp", "detector_onnxruntime.cpp")]
    command = [compiler, "-std=c++17", "-ffp-contract=off", *sources, f"-I{header.parent}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(tmp_path / "detect")]
    subprocess.run([*command, *link], check=True)
    image = bundle.golden().images[0]
    Image.fromarray(image).save(tmp_path / "i.ppm")
    run = subprocess.run(
        [tmp_path / "detect", bundle.model, tmp_path / "i.ppm", "0"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (expected,) = open_engine(bundle.path, "onnxruntime")([image])
    lines = [line.split() for line in run.stdout.splitlines()]
    np.testing.assert_allclose([float(x[0]) for x in lines], expected.scores, atol=2e-4)
    np.testing.assert_allclose(
        [[float(v) for v in x[2:6]] for x in lines], expected.boxes, atol=0.02
    )
    if expected.masks is not None:
        found = [Rle(mask.size, x[6]) for mask, x in zip(expected.masks, lines, strict=True)]
        assert min(map(overlap, expected.masks, found)) > 0.99
    names = bundle.info.model.classes.names
    assert [x[1] for x in lines] == [names[k] for k in expected.labels.tolist()]


def test_what_comes_after_the_graph_is_not_left_out_silently(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "x.bundle", nms=0.8)
    for deploy in (
        lambda: write_sample(bundle, tmp_path, "onnxruntime"),
        lambda: write_repository(bundle, tmp_path),
    ):
        with pytest.raises(
            UserError, match=r"duplicates after the graph \(detector.nms: 0\.8\)"
        ) as e:
            deploy()
        assert e.value.code == "deploy-nms"
