"""Lays out the Python bindings of TensorRT and CUDA, release by release, for the tests.

    python tools/bindings.py [--out build/bindings]

TensorRT itself comes from NVIDIA's own index and needs a GPU; its bindings are small wheels, and
with empty libraries in place of TensorRT's they import anywhere: every class, enum and method can
then be looked up and a plugin's declarations be checked, though nothing runs. Each folder gets
``tensorrt_bindings`` and, in ``stub``, the libraries. cuda-bindings come as they are, and call a
stand-in for the driver; an old assembler takes the plugin's PTX. What is there already is left
alone.

``newest-numpy`` gets the same for a Python of 3.12 or newer, if there is one on the path or among
pyenv's, with the newest numpy, whose types TensorRT 10 reads; an older Python has no such numpy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "bindings"

# One of each kind of docs/tensorrt.md's table; 10.8 is the last without ahead-of-time plugins.
RELEASES = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.8.0.43": "tensorrt-cu12-bindings",
    "10.9.0.34": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
WITHOUT_PLUGINS = ("10.3.0", "10.8.0.43")

# The oldest we take, the last of CUDA 12, the first of 13; tests take the installed one, too.
CUDA_RELEASES = ("12.8.0", "12.9.10", "13.0.3")

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
    """Downloads one release's wheel, unpacks it and, for TensorRT's, compiles its libraries."""
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
        if package.startswith("tensorrt"):
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


def newer_python() -> str | None:
    """The newest Python on the path or of pyenv's that is 3.12 or newer."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    names = [f"python3.{minor}" for minor in range(15, 11, -1)]
    found = [shutil.which(name) for name in names]
    found += [str(p) for name in names for p in sorted(root.glob(f"versions/*/bin/{name}"))]
    for python in filter(None, found):
        # A shim is on the path whatever stands behind it.
        done = subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True)
        if done.returncode == 0:
            return python
    return None


def with_newest_numpy(folder: Path) -> None:
    """A virtual environment with what our plugin's module imports, and its bindings."""
    python = newer_python()
    if python is None:
        print("no Python 3.12 or newer: the plugin is not tried with the newest numpy")
        return
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    subprocess.run(
        [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "numpy>=2.5",
         "click", "onnx", "onnxruntime", "pillow", "pydantic", "pyyaml", "tqdm"],
        check=True,
    )  # fmt: skip
    for release, package in RELEASES.items():
        if release in WITHOUT_PLUGINS:  # and not for every newer Python
            continue
        if not (folder / "bindings" / release).exists():
            lay_out(release, package, folder / "bindings" / release, str(own))
    print(folder)


def with_assembler(folder: Path) -> None:
    """The assembler of an old CUDA 12, as the drivers of that time have it."""
    if not folder.exists():
        lay_out(folder.name, "nvidia-cuda-nvcc-cu12", folder, sys.executable)
        for program in folder.glob("nvidia/*/bin/ptxas"):
            program.chmod(0o755)
    print(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    wanted = [(options.out / "tensorrt" / r, r, package) for r, package in RELEASES.items()]
    wanted += [(options.out / "cuda" / r, r, "cuda-bindings") for r in CUDA_RELEASES]
    for folder, release, package in wanted:
        if not folder.exists():
            lay_out(release, package, folder, sys.executable)
        print(folder)
    with_assembler(options.out / "ptxas" / "12.0.140")
    with_newest_numpy(options.out / "newest-numpy")


if __name__ == "__main__":
    main()
