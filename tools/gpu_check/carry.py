"""Packs gpu-check for a machine that has torch and reaches no package index: one archive.

    python -m tools.gpu_check.carry [--python 3.12] [--out build/gpu-check.tar.gz] [BUNDLE ...]

and there, with the Python that has torch:

    tar xf gpu-check.tar.gz && cd gpu-check
    PYTHONPATH=site python3 -m tools.gpu_check --seconds 360 --out .

What the machine must have is torch with CUDA and numpy, timm, transformers' own needs and
cuda-bindings with NVRTC. Everything else that the project imports is in ``site``, in the versions
installed here; the compiled CPU kernel is not, so the CPU's side is ``grid_sample`` there. TensorRT
is larger than the archive may be: where it is installed, it is checked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tools.gpu_check.process import ROOT

MOST_BYTES = 60_000_000
# What the project imports and a machine with torch may lack.
PACKAGES = (
    "annotated-types",
    "click",
    "faster-coco-eval",
    "jinja2",
    "markupsafe",
    "ml-dtypes",
    "nvidia-ml-py",
    "onnx",
    "pillow",
    "protobuf",
    "pydantic",
    "pydantic-core",
    "pyyaml",
    "safetensors",
    "scipy",
    "tqdm",
    "typing-extensions",
    "typing-inspection",
)
# What it has to have.
THERE = ("cuda-bindings", "numpy", "timm", "torch", "transformers", "triton")
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_LEFT_OUT = ("docs/", "tests/", ".ci/")
# Of wheels: tests and headers nobody imports.
_UNUSED = ("/tests/", "/test/", "/include/", ".pyi", ".pyx", ".pxd")


def wheels(folder: Path, python: str) -> list[Path]:
    """The packages for a Python on 64-bit Linux, in the versions installed here."""
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python, "--dest", str(folder)]
    for platform in _PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*command, *wanted], check=True)
    return sorted(folder.glob("*.whl"))


def pack(out: Path, carried: list[Path], bundles: list[Path]) -> int:
    """Writes the archive: the project's committed and changed files, packages, bundles.

    Returns:
        Its size in bytes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:gz", compresslevel=9) as archive:
        for name in _files():
            archive.add(ROOT / name, f"gpu-check/{name}")
        for wheel in carried:
            with zipfile.ZipFile(wheel) as content:
                for entry in content.infolist():
                    if entry.is_dir() or any(part in f"/{entry.filename}" for part in _UNUSED):
                        continue
                    info = tarfile.TarInfo(f"gpu-check/site/{entry.filename}")
                    info.size, info.mode = entry.file_size, 0o644
                    archive.addfile(info, io.BytesIO(content.read(entry)))
        for bundle in bundles:
            archive.add(bundle, f"gpu-check/{bundle.name}")
    return out.stat().st_size


def _files() -> list[str]:
    """Files of the project that belong to it, as paths from its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    names = [name for name in done.stdout.splitlines() if not name.startswith(_LEFT_OUT)]
    return [name for name in names if (ROOT / name).is_file()]


def main() -> int:
    """Exit status: 1 where the archive is larger than it may be."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.carry")
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--python", default="3.12", help="version there")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check.tar.gz")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        size = pack(options.out, wheels(Path(scratch), options.python), options.bundles)
    print(f"{options.out}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        print(f"more than {MOST_BYTES / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
