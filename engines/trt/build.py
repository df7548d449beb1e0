"""From a bundle to a TensorRT engine with its evidence, for both runtimes.

``BUNDLE/engines/BACKEND-ARCHITECTURE-PRECISION/`` gets ``model.engine``, ``evidence.json``,
``build.log`` and ``layers.json``. Networks are strongly typed: precision is what the graph says.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr.cli_support import progress
from detr.errors import UserError
from detr.files import sha256, write_atomic
from engines.bundle import MODEL, Bundle
from engines.evidence import EngineBuild, Evidence, LayerCount, PtxVersions
from engines.external_weights import save_with_weights
from engines.trt import dla, rtx
from engines.trt.backend import Backend, BuildLowering, load
from engines.trt.check import here_platform, plugin_hash
from engines.trt.cuda import compute_capability, no_device
from engines.trt.layers import LayerReport, network_layers, with_engine, with_log
from engines.trt.log import Log, Progress, make_logger, make_monitor
from engines.trt.lowering import attentions, lowered_model

ENGINE = "model.engine"
BUILD_LOG = "build.log"

_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+)")


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        lowering: Of deformable attention; the backend's own choice where ``None``.
        compute_capabilities: GPUs it is for (86, 89); this machine's where empty.
        timing_cache: File of measured tactics, read and written back.
        version_compatible: Whether it shall run in other releases of the same major version.
        hardware_compatible: Whether it shall run on any GPU from Ampere on.
        profile_batch: Smallest, usual and largest batch of a dynamic graph.
        dla: Whether backbone and neck shall run on a Jetson's deep learning accelerator.
    """

    lowering: BuildLowering | None = None
    compute_capabilities: tuple[int, ...] = ()
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    profile_batch: tuple[int, int, int] = (1, 1, 4)
    dla: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk.

    Attributes:
        folder: Where it lies.
        evidence: What was written beside it.
        layers: Its layer report.
    """

    folder: Path
    evidence: Evidence
    layers: LayerReport

    @property
    def build(self) -> EngineBuild:
        """How it was built."""
        assert self.evidence.build is not None
        return self.evidence.build


def build_engine(
    bundle: Bundle,
    backend: Backend,
    options: BuildOptions = BuildOptions(),
) -> BuiltEngine:
    """Builds a bundle's engine and writes it into the bundle, in place of one of the same name.

    Its evidence says ``unverified``: whether it answers rightly is for the parity gate to find out.

    Raises:
        UserError: ``tensorrt-missing``, ``tensorrt-version``, ``tensorrt-parse``,
            ``tensorrt-build``, ``engine-option`` (an option this backend lacks),
            ``compute-capability``, ``timing-cache``, ``plugin-shape`` and
            ``cuda-bindings-missing`` (our plugin cannot be compiled).
    """
    _check_options(backend, options)
    if options.dla and bundle.info.precision == "fp32":
        raise UserError(
            "engine-option",
            f"--dla: the accelerator computes in FP16 and INT8, and {bundle.path} is fp32; export "
            "it with --precision fp16",
        )
    trt = load(backend)
    capabilities = _targets(backend, options)
    if backend.names_targets:
        rtx.check_targets(trt, capabilities)
    lowering = options.lowering or backend.lowering(trt.__version__)
    if lowering == "plugin" and not backend.takes_plugins(trt.__version__):
        raise UserError(
            "engine-option",
            f"--lowering plugin: {backend.name} {trt.__version__} does not compile plugins ahead "
            "of time; take --lowering gather",
        )
    ptx = _compiled_plugin(bundle) if lowering == "plugin" else None
    folder = engine_folder(bundle, backend, capabilities, options)
    log = Log()
    start = time.perf_counter()
    try:
        build = _Build(trt, backend, options, log, bundle)
        data = build.run(lowering, capabilities)
    finally:
        # Also of a build that failed: it says why.
        write_atomic(folder / BUILD_LOG, log.text())
    seconds = time.perf_counter() - start
    write_atomic(folder / ENGINE, data)
    layers, device_memory = _opened(trt, build, data)
    layers.write(folder)
    memory = {kind.lower(): int(size) for kind, size in _MEMORY.findall(log.text())}
    if device_memory is not None:
        memory["device"] = device_memory
    evidence = Evidence(
        artifact=ENGINE,
        sha256=sha256(folder / ENGINE),
        bundle_sha256=bundle.info.fingerprint,
        backend=backend.name,
        build=EngineBuild(
            version=trt.__version__,
            platform=here_platform(),
            compute_capabilities=capabilities,
            precision=bundle.info.precision,
            lowering=lowering,
            plugin_sha256=plugin_hash() if lowering == "plugin" else None,
            ptx=ptx,
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            dla_layers=build.dla_layers,
            batch=build.batch,
            seconds=round(seconds, 1),
            bytes=len(data),
            memory_bytes=memory,
            layers=LayerCount(source=layers.source, count=layers.count),
            not_run_because=_not_run_because(capabilities),
        ),
    )
    evidence.write(folder)
    return BuiltEngine(folder, evidence, layers)


def engine_folder(
    bundle: Bundle,
    backend: Backend,
    capabilities: tuple[int, ...],
    options: BuildOptions = BuildOptions(),
) -> Path:
    """Where the engine of a bundle for some GPUs lies."""
    architecture = "ampere-plus" if options.hardware_compatible else ""
    architecture = architecture or "sm" + "-".join(str(c) for c in capabilities)
    architecture += "-dla" if options.dla else ""
    return bundle.path / "engines" / f"{backend.name}-{architecture}-{bundle.info.precision}"


def _check_options(backend: Backend, options: BuildOptions) -> None:
    """Refuses what a backend cannot do.

    Raises:
        UserError: ``engine-option``.
    """
    faults = {
        f"--lowering plugin: {backend.name} takes no plugins of ours; take --lowering gather": (
            options.lowering == "plugin" and backend.plugins is None
        ),
        f"--compute-capability: {backend.name} builds for the GPU it runs on; leave it out, or "
        "take --backend tensorrt-rtx": (
            bool(options.compute_capabilities) and not backend.names_targets
        ),
        f"--timing-cache: {backend.name} measures no tactics when it builds; leave it out": (
            options.timing_cache is not None and not backend.timing_cache
        ),
        f"--version-compatible: {backend.name} engines run in the release that built them only": (
            options.version_compatible and not backend.compatibility
        ),
        f"--hardware-compatible: {backend.name} engines are for the GPUs of --compute-capability, "
        "which may be several": (options.hardware_compatible and not backend.compatibility),
        f"--dla: {backend.name} runs on no Jetson; take --backend tensorrt": (
            options.dla and backend.names_targets
        ),
    }
    for message, wrong in faults.items():
        if wrong:
            raise UserError("engine-option", message)


def _targets(backend: Backend, options: BuildOptions) -> tuple[int, ...]:
    """The compute capabilities to build for.

    Raises:
        UserError: ``device-missing``.
    """
    if options.compute_capabilities:
        return tuple(sorted(set(options.compute_capabilities)))
    here = compute_capability()
    if here is None:
        raise UserError(
            "device-missing",
            f"{no_device()}: name the target's compute capability, such as "
            "--compute-capability 86,89"
            if backend.names_targets
            else f"{no_device()}, and tensorrt builds on the target only; "
            "--backend tensorrt-rtx --compute-capability 86,89 builds here",
        )
    return (here,)


def _compiled_plugin(bundle: Bundle) -> PtxVersions | None:
    """Compiles every kernel the graph needs, and says in which versions of PTX.

    TensorRT asks for them in the middle of a build, from C++, where a reason would be lost.

    Raises:
        UserError: ``plugin-shape`` or ``cuda-bindings-missing``.
    """
    from engines.msda_plugin import attention_of, plugin_ptx

    found = {plugin_ptx(attention_of(*attention)).versions for attention in attentions(bundle)}
    if not found:
        return None
    (versions,) = found
    return PtxVersions(compiled=versions[0], embedded=versions[1])


def _not_run_because(capabilities: tuple[int, ...]) -> str | None:
    """Why an engine that was just built cannot run on this machine, ``None`` where it can."""
    here = compute_capability()
    if here is None:
        return f"on the machine that built it: {no_device()}"
    if here not in capabilities:
        return f"the GPU of the machine that built it has compute capability {here}"
    return None


class _Build:
    """One run of a builder; it holds what must live until the engine is serialized."""

    def __init__(
        self, trt: Any, backend: Backend, options: BuildOptions, log: Log, bundle: Bundle
    ) -> None:
        self.trt, self.backend, self.options = trt, backend, options
        self.log, self.bundle = log, bundle
        self.logger = make_logger(trt, log)
        self.batch = _batch(bundle, options)
        self.layers: LayerReport | None = None
        self.dla_layers = 0

    def run(self, lowering: BuildLowering, capabilities: tuple[int, ...]) -> bytes:
        trt = self.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(self._network_flags(lowering))
        model = lowered_model(self.bundle, lowering)
        on_accelerator = dla.front(model)
        with (
            tempfile.TemporaryDirectory() as scratch,
            progress(iter(()), f"build {self.backend.name}", 100) as bar,
        ):
            bar.set_postfix_str("parsing the graph")
            # A file, with the weights beside it: no message of protobuf's is larger than 2 GiB.
            path = Path(scratch) / MODEL
            save_with_weights(model, path)
            parser = trt.OnnxParser(network, self.logger)
            if not parser.parse_from_file(str(path)):
                raise self._parse_error(parser)
            self.layers = network_layers(network)
            config = builder.create_builder_config()
            keep = self._configure(builder, network, config, capabilities)
            if self.options.dla:
                self.dla_layers = dla.place(trt, builder, network, config, on_accelerator)
            watch = Progress(bar)
            # Held by name: the bindings of some releases keep no reference of their own.
            config.progress_monitor = monitor = make_monitor(trt, watch)
            plan = builder.build_serialized_network(network, config)
            del monitor
            if watch.interrupted:
                raise KeyboardInterrupt
        if plan is None:
            raise UserError(
                "tensorrt-build",
                f"{self.bundle.path}: {self.backend.name} {trt.__version__} built no engine: "
                f"{self.log.last_error()}; more in {BUILD_LOG}",
            )
        keep(config)
        return bytes(plan)

    def _network_flags(self, lowering: BuildLowering) -> int:
        flags = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if lowering == "plugin":
            from engines import msda_plugin

            msda_plugin.register()
            flags |= msda_plugin.network_flags(self.trt)
        return flags

    def _parse_error(self, parser: Any) -> UserError:
        if not parser.num_errors:
            return UserError(
                "tensorrt-parse",
                f"{self.bundle.model}: {self.backend.name} {self.trt.__version__} does not take it "
                f"({self.log.last_error()})",
            )
        parser_error = parser.get_error(0)
        node = parser_error.node_name() or parser_error.node()
        return UserError(
            "tensorrt-parse",
            f"{self.bundle.model}: {self.backend.name} {self.trt.__version__} does not take node "
            f"{node} ({parser_error.node_operator()}): {parser_error.desc()}",
        )

    def _configure(
        self, builder: Any, network: Any, config: Any, capabilities: tuple[int, ...]
    ) -> Callable[[Any], None]:
        """Sets everything that is not precision; returns what is to be done after the build."""
        trt, options = self.trt, self.options
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # FP32 shall be FP32, as in every other runtime; who wants speed takes FP16.
        config.clear_flag(trt.BuilderFlag.TF32)
        if self.backend.names_targets:
            rtx.configure(trt, config, capabilities)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.bundle.info.batch == "dynamic":
            profile = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                rest = tuple(tensor.shape)[1:]
                profile.set_shape(tensor.name, *((size, *rest) for size in self.batch))
            config.add_optimization_profile(profile)
        if options.timing_cache is None:
            return lambda config: None
        path = options.timing_cache
        try:
            old = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError("timing-cache", f"{path}: {error.strerror or error}") from error
        timing_cache = config.create_timing_cache(old)
        if timing_cache is None or not config.set_timing_cache(timing_cache, False):
            # Of another release or GPU, or damaged: the build measures anew.
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return lambda config: _keep_tactics(config, path)


def _keep_tactics(config: Any, path: Path) -> None:
    timing_cache = config.get_timing_cache()
    write_atomic(path, bytes(timing_cache.serialize()))


def _batch(bundle: Bundle, options: BuildOptions) -> tuple[int, int, int]:
    """Smallest, usual and largest batch.

    Raises:
        UserError: ``option-batch``.
    """
    if bundle.info.batch != "dynamic":
        return (bundle.info.batch,) * 3
    low, usual, high = options.profile_batch
    if not 1 <= low <= usual <= high:
        raise UserError(
            "option-batch",
            f"--profile-batch {low},{usual},{high}: smallest, usual and largest batch, ascending",
        )
    return options.profile_batch


def _opened(trt: Any, build: _Build, data: bytes) -> tuple[LayerReport, int | None]:
    """The layer report and the device memory, from the engine where there is a GPU to open it."""
    assert build.layers is not None
    told = with_log(build.layers, build.log.layers)
    if compute_capability() is None:
        return told, None
    runtime = trt.Runtime(build.logger)
    runtime.engine_host_code_allowed = build.options.version_compatible
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:  # it is for another GPU
        return told, None
    return with_engine(told, trt, engine), int(engine.device_memory_size_v2)
