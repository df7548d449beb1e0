"""What cuda-bindings really sends to the driver, read by a stand-in for ``libcuda.so.1``.

The releases of cuda-bindings differ in how they find the driver's functions and turn arguments into
C; ``make bindings`` lays the oldest and others we support out, beside the one installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_driver import compile_driver, environment

ROOT = Path(__file__).resolve().parents[2]
LAID_OUT = ROOT / "build" / "bindings" / "cuda"

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="no C compiler"
)

# The kernels' code is not what is tried here: nothing compiles or runs it.
START = """
import sys
sys.path.insert(0, {bindings!r})
from cuda.bindings import __version__, nvrtc
nvrtc.nvrtcVersion = lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 13, 5)
nvrtc.nvrtcGetSupportedArchs = lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, [75, 90])
from detr.msda import cuda_kernels
from detr.msda.cuda_source import Attention
asked = []
def compiled(source, architecture, kind):
    asked.append((architecture, kind))
    return (b"\\x7fELF" if kind == "CUBIN" else b"//\\n.version 9.5") + b"\\0"
cuda_kernels._compile_text = compiled
attention = Attention("float16", 8, 32, 2, 4)
shapes = ((6, 9), (3, 5))
"""
FORWARD = "cuda_kernels.forward(attention, {device}, 77, (2, 5), [16, 32, 48], 64, shapes)\n"
BACKWARD = (
    "cuda_kernels.backward("
    "attention, {device}, 78, (1, 3), [16, 32, 48, 64], [80, 96, 112], shapes)\n"
)


def releases() -> list[str]:
    """Folders with a ``cuda`` package; the empty one stands for what is installed."""
    return ["", *(str(path) for path in sorted(LAID_OUT.glob("*")))]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(params=releases(), ids=lambda path: Path(path).name or "installed")
def bindings(request: pytest.FixtureRequest) -> str:
    if not request.param:
        pytest.importorskip("cuda.bindings")
    return str(request.param)


def run(
    driver: Path, bindings: str, program: str, **more: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """The driver's notes on a program, and how the program ended."""
    done = subprocess.run(
        [sys.executable, "-c", START.format(bindings=bindings or str(ROOT)) + program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(driver, **more),
    )
    return (driver / "log").read_text().splitlines(), done


def test_the_driver_reads_what_was_meant(driver: Path, bindings: str) -> None:
    """Pointers, counts and levels at their places, in the device's context, once loaded."""
    program = FORWARD.format(device=1) * 2 + BACKWARD.format(device=1) + "print(asked)"
    notes, done = run(driver, bindings, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('sm_90', 'CUBIN')]", "compiled more than once"
    forward = (
        "launch forward grid 3 1 1 block 128 1 1 shared 0 stream 77 context 2 extra (nil) "
        "values 16 32 48 5 80 64 6 9 3 5"
    )
    backward = (
        "launch backward grid 1 1 1 block 128 1 1 shared 0 stream 78 context 2 extra (nil) "
        "values 16 32 48 64 3 24 80 96 112 6 9 3 5"
    )
    assert notes == [
        "retain 1",
        "push 2",
        "load \x7fELF jit 0 options 0",
        "kernel msda_forward",
        "kernel msda_backward",
        forward,
        "pop 2",
        "push 2",
        forward,
        "pop 2",
        "push 2",
        backward,
        "pop 2",
    ]


def test_another_thread_gets_the_context_too(driver: Path, bindings: str) -> None:
    """Autograd's threads have called no CUDA before; what they are given is taken back."""
    program = (
        "import threading\n"
        f"def work():\n    {FORWARD.format(device=0)}"
        "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
        + FORWARD.format(device=0)
    )
    notes, done = run(driver, bindings, program)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert sum("context 1" in line for line in notes) == 2
    assert notes.count("push 1") == notes.count("pop 1") == 2


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("cuLaunchKernel=700", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuLaunchKernel=900", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
        ("cuLibraryLoadData=222", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
        ("cuDevicePrimaryCtxRetain=2", "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_what_the_driver_refuses_is_told_and_leaves_no_context(
    driver: Path, bindings: str, fail: str, words: str
) -> None:
    notes, done = run(driver, bindings, FORWARD.format(device=0), FAKE_CUDA_FAIL=fail)
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr
    assert notes.count("push 1") == notes.count("pop 1")


RECORDED = """
from cuda.bindings import driver
mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
def recorded():
    (error,) = driver.cuStreamBeginCapture(77, mode)
    assert int(error) == 0, error
    try:
        {forward}
    except RuntimeError as refused:
        print(refused)
    error, graph = driver.cuStreamEndCapture(77)
    print(error.name)
"""


def test_a_launch_after_the_first_can_be_recorded(driver: Path, bindings: str) -> None:
    """It loads, allocates and asks nothing; forward and backward are loaded together."""
    forward = FORWARD.format(device=0)
    program = RECORDED.format(forward=BACKWARD.format(device=0)) + forward + "recorded()\n"
    notes, done = run(driver, bindings, program)
    assert done.stdout.split() == ["CUDA_SUCCESS"], done
    start = notes.index("record 77 mode 1")
    assert [note.split()[0] for note in notes[start:]] == ["record", "push", "launch", "pop"]


def test_a_first_launch_within_a_recording_is_told(driver: Path, bindings: str) -> None:
    """The recording is void and the stream usable again: the next one succeeds."""
    forward = FORWARD.format(device=0)
    program = RECORDED.format(forward=forward) + f"recorded()\n{forward}recorded()\n"
    _, done = run(driver, bindings, program)
    first, *rest = done.stdout.splitlines()
    assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in first, done
    assert rest == ["CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "CUDA_SUCCESS"]


def test_a_gpu_newer_than_the_compiler_gets_ptx(driver: Path, bindings: str) -> None:
    notes, done = run(
        driver, bindings, FORWARD.format(device=0) + "print(asked)", FAKE_CUDA_CAPABILITY="121"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('compute_90', 'PTX')]"
    assert any("launch forward" in line for line in notes)


def test_a_gpu_the_compiler_has_dropped_is_told(driver: Path, bindings: str) -> None:
    notes, done = run(driver, bindings, FORWARD.format(device=0), FAKE_CUDA_CAPABILITY="70")
    assert done.returncode == 1 and "error[compute-capability]" in done.stderr
    assert "NVRTC 13.5 compiles for 75 and newer" in done.stderr
    assert not any("launch" in line for line in notes)
