"""Which of a bundle's engines may run here. Everything is decided before one is opened.

An engine contains machine code for one architecture and one release of TensorRT; one that does not
fit gives an obscure message at best. Its evidence says what it was built for.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from detr.errors import UserError
from engines.bundle import Bundle
from engines.evidence import EVIDENCE, EngineBuild, Evidence, read_evidence
from engines.trt.backend import TEGRA, Backend, release

# First capability of the generation that hardware-compatible engines are built for.
_AMPERE = 80


@dataclass(frozen=True)
class Here:
    """What this machine offers an engine.

    Attributes:
        version: Of the runtime.
        capability: Of the GPU, 86 for 8.6.
        plugin_sha256: Hash of our plugin's code.
        platform: As :func:`here_platform` gives it.
    """

    version: str
    capability: int
    plugin_sha256: str
    platform: str


def find_engine(
    bundle: Bundle, backend: Backend, here: Here, ungated: bool = False
) -> tuple[Path, Evidence]:
    """The folder of the bundle's engine for this machine, and its evidence.

    Args:
        bundle: Where to look.
        backend: Whose engine.
        here: What it must fit.
        ungated: Whether one the parity gate rejected will do; for the gate itself.

    Raises:
        UserError: ``engine-not-built``, or why none of those there fits: ``engine-stale``,
            ``engine-version``, ``engine-platform``, ``engine-architecture``, ``engine-plugin``,
            ``engine-rejected``,
            ``evidence-unreadable``.
    """
    command = rebuild_command(bundle, backend, here.capability)
    refusals: list[UserError] = []
    fitting: list[tuple[Path, Evidence]] = []
    for path in sorted(bundle.path.glob(f"engines/*/{EVIDENCE}")):
        try:
            evidence = read_evidence(path.parent)
        except UserError as error:  # damaged: no reason not to look at the others
            refusals.append(error)
            continue
        if evidence.backend != backend.name:
            continue
        refused = _refusal(bundle, evidence, here, backend, path.parent, command)
        if refused is None and evidence.status == "rejected" and not ungated:
            refused = UserError(
                "engine-rejected",
                f"{path.parent}: the parity gate rejected it ({'; '.join(evidence.reasons)}); "
                f"{_way_out(evidence)}",
            )
        if refused is None:
            fitting.append((path.parent, evidence))
        else:
            refusals.append(refused)
    if fitting:
        return min(fitting, key=_preference)
    if refusals:
        raise refusals[0]
    raise UserError(
        "engine-not-built", f"{bundle.path}: no {backend.name} engine in it; build one: {command}"
    )


def _preference(engine: tuple[Path, Evidence]) -> tuple[bool, bool, Path]:
    """Small for the engine to take: one that was accepted, then one built for this very GPU."""
    path, evidence = engine
    portable = evidence.build is not None and evidence.build.hardware_compatible
    return evidence.status != "accepted", portable, path


def rebuild_command(bundle: Bundle, backend: Backend, capability: int) -> str:
    """What to type for an engine that fits here."""
    command = f"detr export trt {bundle.path} --backend {backend.name}"
    return command + (f" --compute-capability {capability}" if backend.names_targets else "")


def here_platform() -> str:
    """Operating system and processor, with ``-tegra`` on a Jetson.

    An engine holds code for the host, too; one that fits other GPUs still fits no other platform.
    """
    return f"{sys.platform}-{platform.machine()}{'-tegra' if TEGRA.exists() else ''}"


def plugin_hash() -> str:
    """Hash of everything the plugin's code in an engine follows from."""
    from detr.msda import cuda_kernels, cuda_source
    from engines import msda_plugin

    modules = (cuda_source, cuda_kernels, msda_plugin)
    files = [cuda_source.HEADER, cuda_source.KERNELS]
    files += [Path(str(module.__file__)) for module in modules]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _refusal(
    bundle: Bundle, evidence: Evidence, here: Here, backend: Backend, folder: Path, command: str
) -> UserError | None:
    if evidence.bundle_sha256 != bundle.info.fingerprint:
        return UserError(
            "engine-stale",
            f"{folder}: built from another graph, or for other classes or preprocessing, than the "
            f"bundle's; build it again: {command}",
        )
    build = evidence.build
    if build is None:
        return UserError(
            "evidence-unreadable",
            f"{folder / EVIDENCE}: build: says nothing of the engine; build it again: {command}",
        )
    if not _version_fits(build, here.version):
        return UserError(
            "engine-version",
            f"{folder}: built with {backend.name} {build.version}, this is {here.version}; "
            f"build it again: {command}",
        )
    if build.platform != here.platform:
        return UserError(
            "engine-platform",
            f"{folder}: built on {build.platform or 'an unknown platform'}, this is "
            f"{here.platform}; build it again: {command}",
        )
    fits = here.capability in build.compute_capabilities or (
        build.hardware_compatible and here.capability >= _AMPERE
    )
    if not fits:
        return UserError(
            "engine-architecture",
            f"{folder}: built for compute capability "
            f"{', '.join(map(str, build.compute_capabilities))}, this GPU has {here.capability}; "
            f"build it again: {command}",
        )
    if build.lowering == "plugin" and build.plugin_sha256 != here.plugin_sha256:
        return UserError(
            "engine-plugin",
            f"{folder}: contains another version of our deformable-attention plugin; build it "
            f"again: {command}",
        )
    return None


def _version_fits(build: EngineBuild, version: str) -> bool:
    """Engines run in the release that built them; compatible ones in later ones of its major."""
    built, here = release(build.version), release(version)
    if build.version_compatible:
        return built[0] == here[0] and built <= here
    return built == here


def _way_out(evidence: Evidence) -> str:
    if evidence.build is not None and evidence.build.lowering == "gridsample":
        return "build it with --lowering gather"
    return "run the bundle in another engine, or export it with --precision fp32"
