"""What gpu-check imports is carried, or comes with torch on the machine it is carried to."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools.gpu_check import carry
from tools.gpu_check.plan import STAGES

# Imports every stage and trains a step of it, where packages that are not carried cannot be
# imported, as on the machine they are not on; prints what was imported of others.
PROGRAM = """
import json, sys
from pathlib import Path

from importlib.machinery import PathFinder

ABSENT = set(json.loads(sys.argv[1]))

class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Present
from tools.gpu_check import __main__, training
from tools.gpu_check.part import Setting
from tools.gpu_check.plan import STAGES
setting = Setting("cpu", (Path("a.bundle"), Path("b.bundle")))
assert all(stage.parts(setting) for stage in STAGES.values())
training.compared("cpu", 1, "off")
tops = {name.split(".")[0] for name, module in sys.modules.items()
        if "site-packages" in (getattr(module, "__file__", None) or "")}
print(json.dumps(sorted(tops)))
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions and all that they need, by normalized name."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system, or not needed by what is installed
        left += [re.split(r"[\s;<>=!~\[(]", one)[0] for one in needed if "extra ==" not in one]
    return found


@pytest.mark.slow
def test_nothing_else_is_imported() -> None:
    carried = set(carry.PACKAGES) | closure(carry.THERE) | {"detr-distillery"}
    absent = [
        top
        for top, owners in importlib.metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", name).lower() in carried for name in owners)
    ]
    assert {"openvino", "ray", "transformers"} & set(absent), "the check itself keeps nothing away"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(absent)],
        capture_output=True,
        text=True,
        cwd=carry.ROOT,
    )
    assert done.returncode == 0, done.stderr
    tops = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in tops and "pydantic" in tops, "the check itself finds nothing"


def test_the_archive_holds_project_packages_and_bundles(tmp_path: Path) -> None:
    wheel, bundle = tmp_path / "some-1.0.whl", tmp_path / "x.bundle"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/__init__.py", "")
        archive.writestr("some/tests/test_x.py", "")
    bundle.mkdir()
    (bundle / "bundle.json").write_text("{}")
    out = tmp_path / "made" / "check.tar.gz"
    assert carry.pack(out, [wheel], [bundle]) == out.stat().st_size < 10_000_000
    with tarfile.open(out) as archive:
        names = set(archive.getnames())
    assert {
        "gpu-check/tools/gpu_check/__main__.py",
        "gpu-check/detr/msda/cuda/msda.cu",
        "gpu-check/site/some/__init__.py",
        "gpu-check/x.bundle/bundle.json",
    } <= names
    assert not any(name.startswith("gpu-check/tests") or "test_x" in name for name in names)
    assert all(
        f"gpu-check/tools/gpu_check/{stage.place.split(':')[0]}.py" in names
        for stage in STAGES.values()
    )
