"""Lays out TensorRT's Python bindings, release by release, for the tests that look names up.

    python tools/tensorrt_bindings.py [--python PYTHON] [--out build/tensorrt-bindings]

TensorRT itself comes from NVIDIA's own index and needs a GPU; its bindings are small wheels, and
with empty libraries in place of TensorRT's they import anywhere: every class, enum and method can
then be looked up and a plugin's declarations be checked, though nothing runs. Each folder gets
``tensorrt_bindings`` and, in ``stub``, the libraries. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "tensorrt-bindings"

# One of each kind of docs/tensorrt.md's table; 10.8 is the last without ahead-of-time plugins.
RELEASES = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.8.0.43": "tensorrt-cu12-bindings",
    "10.9.0.34": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}

# What the bindings take from TensorRT's libraries by name when they are loaded.
_SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getInferLibVersion",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def lay_out(release: str, package: str, folder: Path, python: str) -> None:
    """Downloads one release's wheel, unpacks it and compiles its libraries."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary=:all:", "--dest", scratch, f"{package}=={release}"],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        _compile_libraries(unpacked / "stub", release.split(".")[0])
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, folder)


def _compile_libraries(folder: Path, major: str) -> None:
    folder.mkdir()
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        symbols = _SYMBOLS if name == "nvinfer" else ()
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols)
        library = f"lib{name}.so.{major}"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / library),
             f"-Wl,-soname,{library}"],
            input=source, text=True, check=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", default=sys.executable, help="whose wheels; with pip")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for release, package in RELEASES.items():
        folder = options.out / release
        if not folder.exists():
            lay_out(release, package, folder, options.python)
        print(folder)


if __name__ == "__main__":
    main()
