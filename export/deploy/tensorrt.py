"""``export trt``: from a bundle to an engine, unless it is known to come out wrong."""

from __future__ import annotations

from pathlib import Path

import click

from detr.cli_support import emit, json_option
from detr.errors import GateError, UserError
from engines.bundle import Bundle, open_bundle
from engines.evidence import Evidence, read_evidence
from engines.open import open_engine
from engines.trt.backend import BACKENDS, Backend, BuildLowering, load
from engines.trt.build import BuildOptions, BuiltEngine, build_engine
from engines.trt.cuda import compute_capability
from engines.trt.engine import TrtEngine
from engines.trt.lowering import lowered_model
from export.deploy.known_bad import known_bad, used_ops
from export.parity.evidence import refuse_rejected


def refuse_known_bad(bundle: Bundle, backend: Backend, options: BuildOptions) -> None:
    """Stops a build that is publicly reported to give wrong answers.

    Raises:
        GateError: ``known-bad``.
        UserError: ``tensorrt-missing``, ``tensorrt-version``.
    """
    version = load(backend).__version__
    ops = used_ops(lowered_model(bundle, options.lowering or backend.lowering(version)))
    here = compute_capability()
    capabilities = options.compute_capabilities or (() if here is None else (here,))
    entries = known_bad(
        backend.name, version, bundle.info.opset, ops, bundle.info.precision, capabilities
    )
    if entries:
        raise GateError(
            "known-bad", f"{bundle.path}: {backend.name} {version}: {entries[0].text()}"
        )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    "backend_name",
    type=click.Choice(list(BACKENDS)),
    default="tensorrt",
    show_default=True,
    help="TensorRT builds for this machine's GPU, TensorRT-RTX also without one.",
)
@click.option(
    "--compute-capability",
    metavar="N[,N]",
    help="GPUs the engine is for, such as 86,89; TensorRT-RTX only.",
)
@click.option(
    "--lowering",
    type=click.Choice(["plugin", "gather", "gridsample"]),
    help="Deformable attention: our kernel (default of TensorRT) or standard operators.",
)
@click.option(
    "--profile-batch",
    default="1,1,4",
    show_default=True,
    metavar="MIN,OPT,MAX",
    help="Batch sizes of a bundle with a dynamic batch.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Reuse measured tactics from this file and add to it; TensorRT only.",
)
@click.option(
    "--version-compatible", is_flag=True, help="Run in later releases of the same major, too."
)
@click.option(
    "--hardware-compatible", is_flag=True, help="Run on any GPU from Ampere on, more slowly."
)
@click.option(
    "--dla",
    is_flag=True,
    help="Run backbone and neck on a Jetson's deep learning accelerator, where it has one.",
)
@click.option("--data", help="Data set to verify the engine on; the golden images by default.")
@click.option("--no-verify", is_flag=True, help="Leave the engine unverified.")
@json_option
def trt(
    bundle: Path,
    backend_name: str,
    compute_capability: str | None,
    lowering: BuildLowering | None,
    profile_batch: str,
    timing_cache: Path | None,
    version_compatible: bool,
    hardware_compatible: bool,
    dla: bool,
    data: str | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Build BUNDLE's TensorRT engine; it lies in the bundle's folder, its evidence beside it.

    Where it can run, it is verified at once: exit status 3 where it does not find what the bundle's
    checkpoint finds, and it is then not loaded any more.

    Example: detr export trt student.bundle --backend tensorrt-rtx --compute-capability 86,89
    """
    options = BuildOptions(
        lowering,
        _numbers(compute_capability, "--compute-capability") if compute_capability else (),
        timing_cache,
        version_compatible,
        hardware_compatible,
        _three(profile_batch),
        dla,
    )
    opened, backend = open_bundle(bundle), BACKENDS[backend_name]
    refuse_rejected(opened)
    refuse_known_bad(opened, backend, options)
    built = build_engine(opened, backend, options)
    verdict = None
    if not no_verify and built.build.not_run_because is None:
        from export.parity.gate import gate_bundle

        engine = open_engine(opened, backend_name, ungated=True, built=built.folder)
        verdict = gate_bundle(opened, data, [engine])
        _profile(opened, engine, built)
    evidence = read_evidence(built.folder)
    emit(evidence, as_json, _text(built, evidence))
    if verdict is not None:
        verdict.check()


def _profile(bundle: Bundle, engine: TrtEngine, built: BuiltEngine) -> None:
    """Adds the time of each layer to the layer report; an engine is as good without."""
    try:
        times = engine.profile_layers(engine.prepare(bundle.golden().images[:1]))
    except RuntimeError as error:
        click.echo(f"layers were not timed: {error}", err=True)
        return
    built.layers.model_copy(update={"milliseconds": times}).write(built.folder)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Positive numbers with commas between.

    Raises:
        UserError: ``option-numbers``.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError("option-numbers", f"{option} {text!r}: numbers with commas between")
    return tuple(int(part) for part in parts)


def _three(text: str) -> tuple[int, int, int]:
    numbers = _numbers(text, "--profile-batch")
    if len(numbers) != 3:
        raise UserError("option-batch", f"--profile-batch {text!r}: three numbers, MIN,OPT,MAX")
    return numbers[0], numbers[1], numbers[2]


def _text(built: BuiltEngine, evidence: Evidence) -> str:
    build = built.build
    types = ", ".join(f"{count} {kind}" for kind, count in built.layers.types.items())
    memory = "".join(
        f", {size / 2**20:.0f} MiB {kind}" for kind, size in build.memory_bytes.items()
    )
    why = build.not_run_because
    status = f"{evidence.status} ({why})" if why and evidence.status == "unverified" else None
    return (
        f"{built.folder / evidence.artifact}: {status or evidence.status}; "
        f"{build.precision}, {build.lowering}, batch {'-'.join(map(str, build.batch))}, "
        f"{build.bytes / 2**20:.1f} MiB{memory}, built in {build.seconds:.0f} s\n"
        f"{built.layers.count} layers, told by the {built.layers.source}: {types}"
    )
