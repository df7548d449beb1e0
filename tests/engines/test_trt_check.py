"""Which engine of a bundle may run here is decided from evidence alone, before one is opened."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detr.errors import UserError
from detr.files import sha256
from engines import open_engine
from engines.bundle import SIDECAR, Bundle, open_bundle
from engines.evidence import Evidence
from engines.trt import backend as backend_module
from engines.trt import check as check_module
from engines.trt import engine as runner
from engines.trt.backend import BACKENDS, load, release
from engines.trt.check import Here, find_engine, plugin_hash

MakeBundle = Callable[..., Path]
HERE = Here("10.16.1.11", 86, "p" * 64, "linux-x86_64")
RTX = Here("1.7.1.116", 89, "p" * 64, "linux-x86_64")
FORMAT1 = Path(__file__).parent / "format1" / "engine-evidence.json"
BUILD: dict[str, Any] = json.loads(FORMAT1.read_text())["build"]


@pytest.fixture
def bundle(toy_bundle: MakeBundle) -> Bundle:
    return open_bundle(toy_bundle())


def add(bundle: Bundle, name: str = "tensorrt-sm86-fp32", **changes: Any) -> Path:
    """Puts an engine into a bundle; ``changes`` are of its evidence or of its build."""
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.engine").write_bytes(name.encode())
    build = BUILD | {
        "version": "10.16.1.11",
        "platform": "linux-x86_64",
        "compute_capabilities": [86],
        "lowering": "plugin",
        "plugin_sha256": "p" * 64,
        "version_compatible": False,
        "hardware_compatible": False,
    }
    fields: dict[str, Any] = {
        "bundle_sha256": bundle.info.fingerprint,
        "backend": "tensorrt",
        "status": "accepted",
    }
    for key, value in changes.items():
        (build if key in build else fields)[key] = value
    sha = sha256(folder / "model.engine")
    Evidence(**{"artifact": "model.engine", "sha256": sha, "build": build} | fields).write(folder)
    return folder


def refusal(bundle: Bundle, here: Here = HERE, backend: str = "tensorrt") -> UserError:
    with pytest.raises(UserError) as error:
        find_engine(bundle, BACKENDS[backend], here)
    return error.value


def test_one_that_fits_is_found(bundle: Bundle) -> None:
    folder = add(bundle)
    found, evidence = find_engine(bundle, BACKENDS["tensorrt"], HERE)
    assert found == folder and evidence.status == "accepted"


def test_without_an_engine_the_command_is_named(bundle: Bundle) -> None:
    error = refusal(bundle)
    assert error.code == "engine-not-built"
    assert f"detr export trt {bundle.path} --backend tensorrt" in error.message
    error = refusal(bundle, RTX, "tensorrt-rtx")
    assert error.message.endswith("--backend tensorrt-rtx --compute-capability 89")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"bundle_sha256": "0" * 64}, "engine-stale", "another graph"),
        ({"version": "11.4.0.106"}, "engine-version", "11.4.0.106, this is 10.16.1.11"),
        ({"version": "9.3.0"}, "engine-version", "9.3.0"),
        ({"version": "10.16.0.9"}, "engine-version", "10.16.0.9"),
        ({"version": "unknown"}, "engine-version", "unknown"),
        ({"build": None}, "evidence-unreadable", "build"),
        ({"version": "11.0.0", "version_compatible": True}, "engine-version", "11.0.0"),
        ({"version": "10.17.0", "version_compatible": True}, "engine-version", "10.17.0"),
        ({"platform": "linux-aarch64"}, "engine-platform", "linux-aarch64, this is linux-x86_64"),
        (
            {"platform": "linux-aarch64-tegra", "hardware_compatible": True},
            "engine-platform",
            "linux-aarch64-tegra",
        ),
        ({"compute_capabilities": [89]}, "engine-architecture", "89, this GPU has 86"),
        ({"plugin_sha256": "q" * 64}, "engine-plugin", "plugin"),
        ({"plugin_sha256": None}, "engine-plugin", "plugin"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_command(
    bundle: Bundle, changes: dict[str, Any], code: str, words: str
) -> None:
    folder = add(bundle, **changes)
    error = refusal(bundle)
    assert error.code == code and words in error.message and str(folder) in error.message
    assert f"detr export trt {bundle.path} --backend tensorrt" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "10.13.0", "version_compatible": True},
        {"compute_capabilities": [80], "hardware_compatible": True},
        {"lowering": "gather", "plugin_sha256": None},
        {"version": "10.16.1"},
    ],
)
def test_what_fits_all_the_same(bundle: Bundle, changes: dict[str, Any]) -> None:
    add(bundle, **changes)
    assert find_engine(bundle, BACKENDS["tensorrt"], HERE)[1].status == "accepted"


def test_hardware_compatible_engines_start_with_ampere(bundle: Bundle) -> None:
    add(bundle, hardware_compatible=True)
    assert refusal(bundle, replace(HERE, capability=75)).code == "engine-architecture"


def test_among_several_the_one_that_fits_is_taken(bundle: Bundle) -> None:
    add(bundle, "a-other-gpu", compute_capabilities=[89])
    add(bundle, "b-rejected", status="rejected", reasons=("boxes",))
    add(bundle, "c-other-backend", backend="tensorrt-rtx", version="1.7.1.116")
    wanted = add(bundle, "d-good")
    assert find_engine(bundle, BACKENDS["tensorrt"], HERE)[0] == wanted


def test_an_accepted_engine_for_this_very_gpu_comes_first(bundle: Bundle) -> None:
    add(bundle, "a-not-compared", status="unverified")
    add(bundle, "b-slower", hardware_compatible=True)
    wanted = add(bundle, "c-exact")
    assert find_engine(bundle, BACKENDS["tensorrt"], HERE)[0] == wanted


def test_damaged_evidence_of_another_engine_is_no_hindrance(bundle: Bundle) -> None:
    damaged = add(bundle, "a-damaged")
    (damaged / "evidence.json").write_text("{")
    assert refusal(bundle).code == "evidence-unreadable"
    wanted = add(bundle, "b-good")
    assert find_engine(bundle, BACKENDS["tensorrt"], HERE)[0] == wanted


@pytest.mark.parametrize("part", ["classes", "preprocess"])
def test_an_engine_for_other_classes_or_preprocessing_is_stale(bundle: Bundle, part: str) -> None:
    """The graph is the same; what goes in or what comes out means something else."""
    add(bundle)
    sidecar = json.loads((bundle.path / SIDECAR).read_text())
    key = {"classes": "names", "preprocess": "mean"}[part]
    sidecar["model"][part][key].reverse()
    (bundle.path / SIDECAR).write_text(json.dumps(sidecar))
    assert refusal(open_bundle(bundle.path)).code == "engine-stale"


@pytest.mark.parametrize(
    ("lowering", "way_out"), [("gridsample", "--lowering gather"), ("plugin", "--precision fp32")]
)
def test_a_rejected_engine_is_refused_unless_asked_for(
    bundle: Bundle, lowering: str, way_out: str
) -> None:
    folder = add(bundle, status="rejected", reasons=("12 missing",), lowering=lowering)
    error = refusal(bundle)
    assert error.code == "engine-rejected"
    assert "12 missing" in error.message and way_out in error.message
    assert find_engine(bundle, BACKENDS["tensorrt"], HERE, ungated=True)[0] == folder


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorrt", "trt"), ("tensorrt-rtx", "rtx")], ids=["tensorrt", "rtx"]
)
def test_a_runtime_that_is_not_installed_names_its_extra(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, BACKENDS[name].module, None)
    with pytest.raises(UserError, match=rf"pip install 'detr-distillery\[{extra}\]'") as error:
        open_engine(bundle.path, name)
    assert error.value.code == "tensorrt-missing" and "\n" not in str(error.value)


def test_a_runtime_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("tensorrt")
    old.__version__ = "10.0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(
        UserError, match=r"10\.0\.1 is too old, it must be 10\.3 .*pip install"
    ) as e:
        load(BACKENDS["tensorrt"])
    assert e.value.code == "tensorrt-version"
    # A Jetson's comes with its system; an index has none for it.
    monkeypatch.setattr(backend_module, "TEGRA", Path(__file__))
    with pytest.raises(UserError, match=r"JetPack 6\.1 has 10\.3") as e:
        load(BACKENDS["tensorrt"])
    assert "pip" not in str(e.value)


@pytest.mark.parametrize(
    ("version", "lowering"),
    [
        ("10.3.0", "gather"),
        ("10.8.0.43", "gather"),
        ("10.9.0.34", "plugin"),
        ("10.13.3.9", "plugin"),
        ("10.16.1.11", "plugin"),
        ("11.4.0.106", "plugin"),
        ("11.5.0", "plugin"),
    ],
)
def test_every_release_takes_a_bundle(
    monkeypatch: pytest.MonkeyPatch, version: str, lowering: str
) -> None:
    """JetPack 6 stays at 10.3, which compiles no Python plugin ahead of time."""
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert load(BACKENDS["tensorrt"]) is module
    assert BACKENDS["tensorrt"].lowering(version) == lowering
    assert BACKENDS["tensorrt-rtx"].lowering("1.7.1.116") == "gather"


def test_releases_compare_as_numbers() -> None:
    assert release("10.9.0") < release("10.13") < release("11.0.0rc1")
    assert release("10.16.1.11") == (10, 16, 1)


class Opened(Exception):
    """Reached the point where an engine is handed to the runtime."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT 10.16 and a GPU; engines are not really opened."""

    def opened(bundle: Bundle, path: Path, data: bytes, *_: Any) -> None:
        assert data == path.parent.name.encode()
        raise Opened(path)

    module = types.SimpleNamespace(__version__="10.16.1.11")
    monkeypatch.setattr(runner, "load", lambda backend: module)
    monkeypatch.setattr(runner, "compute_capability", lambda: 86)
    monkeypatch.setattr(runner, "plugin_hash", lambda: "p" * 64)
    monkeypatch.setattr(runner, "here_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(runner, "Device", lambda: None)
    monkeypatch.setattr(runner, "TrtEngine", opened)


@pytest.mark.usefixtures("gpu")
def test_an_accepted_engine_is_opened(bundle: Bundle) -> None:
    folder = add(bundle)
    with warnings.catch_warnings(), pytest.raises(Opened, match=str(folder)):
        warnings.simplefilter("error")
        open_engine(bundle.path, "tensorrt")


@pytest.mark.usefixtures("gpu")
def test_an_engine_nobody_compared_is_opened_with_a_word(bundle: Bundle) -> None:
    add(bundle, status="unverified")
    with pytest.warns(UserWarning, match="detr export verify"), pytest.raises(Opened):
        open_engine(bundle.path, "tensorrt")


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_was_changed_is_not_opened(bundle: Bundle) -> None:
    folder = add(bundle)
    (folder / "model.engine").write_bytes(b"something else")
    with pytest.raises(UserError, match="not loaded") as error:
        open_engine(bundle.path, "tensorrt")
    assert error.value.code == "artifact-changed"


@pytest.mark.usefixtures("gpu")
def test_an_engine_without_a_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add(bundle)
    monkeypatch.setattr(runner, "compute_capability", lambda: None)
    with pytest.raises(UserError, match="no CUDA device") as error:
        open_engine(bundle.path, "tensorrt")
    assert error.value.code == "device-missing"


@pytest.mark.parametrize("part", ["HEADER", "KERNELS", "source", "launch", "plugin"])
def test_the_plugins_hash_follows_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Kernel and header, how they are compiled and launched, and what TensorRT is told."""
    from detr.msda import cuda_kernels, cuda_source
    from engines import msda_plugin

    before = plugin_hash()
    assert before == plugin_hash() and len(before) == 64
    modules = {"source": cuda_source, "launch": cuda_kernels, "plugin": msda_plugin}
    owner, name = (modules[part], "__file__") if part in modules else (cuda_source, part)
    changed = tmp_path / "changed"
    changed.write_bytes(Path(getattr(owner, name)).read_bytes() + b"// one comment more\n")
    monkeypatch.setattr(owner, name, changed)
    assert plugin_hash() != before


def test_a_jetson_is_a_platform_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers have the same processor, and engines that fit neither."""
    monkeypatch.setattr(check_module.platform, "machine", lambda: "aarch64")
    assert check_module.here_platform() == "linux-aarch64"
    monkeypatch.setattr(check_module, "TEGRA", Path(__file__))
    assert check_module.here_platform() == "linux-aarch64-tegra"
