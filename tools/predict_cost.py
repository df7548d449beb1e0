"""What ``detr predict`` costs beside engine and decoding, and whether its memory grows.

    python -m tools.predict_cost BUNDLE [--images 1000] [--save coco]

Writes a folder of KITTI-sized scenes, three of them broken, and goes through it in portions: each
portion once as a bare loop (decode, run the engine) and once as ``detr predict`` does it, results
files included, taking turns at who is first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import click

from detr.config import ClassMap
from detr.data.images import read_image
from detr.data.synth import generate
from detr.errors import UserError
from engines import Engine, open_engine
from engines.predict.outputs import KINDS, Kind, Results
from engines.predict.run import answers
from engines.predict.sources import Skipped, Source, find_sources

_SCENES, _SIZE, _PORTIONS = 10, (375, 1242), 20
_BROKEN = (0.1, 0.5, 0.9)


def make_folder(folder: Path, count: int) -> None:
    """Scenes under ``count`` names; three of them are cut in the middle."""
    generate(folder / "scenes", _SCENES, _SIZE, seed=1)
    scenes = sorted((folder / "scenes/training/image_2").iterdir())
    (folder / "images").mkdir()
    for n in range(count):
        shutil.copyfile(scenes[n % _SCENES], folder / f"images/{n:06d}.png")
    for share in _BROKEN:
        path = folder / f"images/{int(share * count):06d}.png"
        path.write_bytes(path.read_bytes()[:1000])


def bare(engine: Engine, sources: Sequence[Source]) -> int:
    """Decodes and runs, one image after the other; returns how many there were."""
    count = 0
    for source in sources:
        try:
            image = read_image(source.path)
        except UserError:
            continue
        engine([image])
        count += 1
    return count


def through(engine: Engine, sources: Sequence[Source], results: Results) -> int:
    """The same as the command does it."""
    count = 0
    for one in answers(engine, sources):
        if isinstance(one, Skipped):
            results.skip(one)
        else:
            results.write(one.frame, one.found)
            count += 1
    return count


def resident_mb() -> float:
    """Memory of this process that is in RAM, 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", default=1000)
@click.option("--save", "kinds", multiple=True, type=click.Choice(KINDS), default=("coco",))
def main(bundle: Path, images: int, kinds: tuple[Kind, ...]) -> None:
    """Prints seconds of both, their ratio and the memory after each portion, as JSON."""
    engine = open_engine(bundle)
    classes: ClassMap = engine.info.classes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, images)
        sources = find_sources([folder / "images"])
        results = Results(folder / "out", kinds, sources, classes, None)
        bare(engine, sources[:5])
        times: list[tuple[float, float]] = []
        memory = []
        answered = 0
        for k in range(_PORTIONS):
            portion = sources[k * images // _PORTIONS : (k + 1) * images // _PORTIONS]
            spent = [0.0, 0.0]
            for which in (k % 2, 1 - k % 2):
                began = perf_counter()
                if which:
                    answered += through(engine, portion, results)
                else:
                    bare(engine, portion)
                spent[which] = perf_counter() - began
            times.append((spent[0], spent[1]))
            memory.append(round(resident_mb()))
        results.close()
    alone, whole = (sum(column) for column in zip(*times, strict=True))
    found = {
        "engine": engine.name, "save": kinds, "images": images, "answers": answered,
        "engine_and_decoding_s": round(alone, 1), "predict_s": round(whole, 1),
        "ratio": round(whole / alone, 3), "resident_mb": memory,
    }  # fmt: skip
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
