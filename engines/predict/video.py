"""Reading and writing videos with PyAV, which is imported on use: it is the extra ``video``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from detr.cli_support import missing_extra
from detr.errors import UserError
from detr.files import output_error

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".ts", ".mpg", ".mpeg")

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Clock:
    """When a frame is shown.

    Attributes:
        pts: In units of ``time_base``; None where the file does not tell.
        time_base: Seconds.
        rate: Frames per second of the video, on average.
    """

    pts: int | None
    time_base: Fraction
    rate: Fraction


@dataclass(frozen=True)
class OpenVideo:
    """A video file's first video stream.

    Attributes:
        container: PyAV's.
        stream: PyAV's.
        frames: How many there are, None where the file does not tell.
    """

    container: Any
    stream: Any
    frames: int | None


def _av() -> ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        raise missing_extra(error, "a video") from error
    module: ModuleType = av
    return module


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[OpenVideo]:
    """Opens a video and closes it again.

    Raises:
        UserError: ``video-unreadable``, ``extra-missing``; also where reading inside fails.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError("video-unreadable", f"{path}: has no picture in it")
            stream = container.streams.video[0]
            yield OpenVideo(container, stream, stream.frames or None)
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("video-unreadable", f"{path}: {reason}") from error


def read_video(path: Path) -> Iterator[tuple[Pixels, Clock]]:
    """The frames of a video in the order they are shown, turned as its file says.

    Yields:
        ``[h, w, 3]`` RGB and the frame's time.

    Raises:
        UserError: ``video-unreadable``, also in the middle, after the frames before the damage.
    """
    count = 0
    try:
        with open_video(path) as video:
            rate = Fraction(video.stream.average_rate or video.stream.guessed_rate or 25)
            for frame in video.container.decode(video.stream):
                pixels = frame.to_ndarray(format="rgb24")
                # Phones store a portrait lying on its side.
                pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
                yield pixels, Clock(frame.pts, frame.time_base or video.stream.time_base, rate)
                count += 1
    except UserError as error:
        if not count or error.code != "video-unreadable":
            raise
        reason = error.message.removeprefix(f"{path}: ")
        raise UserError(error.code, f"{path}: after {count} frames: {reason}") from error
    if not count:
        raise UserError("video-unreadable", f"{path}: has no frame")


class VideoWriter:
    """Writes frames as H.264 in MP4, each shown when its original was; no sound.

    Args:
        path: Replaced.

    Raises:
        UserError: ``output-unwritable``.
    """

    def __init__(self, path: Path) -> None:
        self._av = _av()
        self._path = path
        self._stream: Any = None
        self._count = 0
        with self._failing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self._av.open(str(path), "w", format="mp4")

    def write(self, pixels: Pixels, clock: Clock) -> None:
        """Adds a frame.

        Raises:
            UserError: ``output-unwritable``, ``disk-full``; ``video-encoder`` where this PyAV has
                no H.264 or the frames change their size.
        """
        stream = self._stream or self._open(pixels, clock)
        # H.264's colors come in blocks of two by two: an odd line or column is repeated.
        odd = [size % 2 for size in pixels.shape[:2]]
        whole = np.pad(pixels, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        if whole.shape[:2] != (stream.height, stream.width):
            raise UserError("video-encoder", f"{self._path}: the video's frames change their size")
        frame = self._av.VideoFrame.from_ndarray(whole, format="rgb24")
        if clock.pts is None:
            frame.pts, frame.time_base = self._count, 1 / clock.rate
        else:
            frame.pts, frame.time_base = clock.pts, clock.time_base
        self._count += 1
        self._mux(frame)

    def close(self) -> None:
        """Writes what is still in the encoder."""
        if self._stream is not None:
            self._mux(None)
        with self._failing():
            self._container.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (self._av.FFmpegError, OSError) as error:
            raise output_error(self._path, error) from error

    def _open(self, pixels: Pixels, clock: Clock) -> Any:
        try:
            stream = self._container.add_stream("h264", rate=clock.rate)
        except self._av.FFmpegError as error:
            raise UserError(
                "video-encoder", f"{self._path}: this PyAV cannot write H.264"
            ) from error
        height, width = pixels.shape[:2]
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = 1 / clock.rate if clock.pts is None else clock.time_base
        self._stream = stream
        return stream

    def _mux(self, frame: Any) -> None:
        with self._failing():
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
