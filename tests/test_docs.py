"""What README and docs say can be done: blocks run, commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from detr.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = "detr|distill|export|engines|bench|tests|docs|tools"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Our commands in a page's shell blocks, as words; ``NAME=value`` lines before them hold."""
    found = []
    variables: dict[str, str] = {}
    for block in blocks(page.read_text(), "(?:bash|sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r"\w+=", words[0]):
                name, _, value = words[0].partition("=")
                variables[name] = value
            elif words and words[0] in ("detr", "distill", "bench"):
                found.append(words if words[0] == "detr" else ["detr", *words])
    return found


def parsed(words: list[str]) -> click.Context:
    """The context of the last command in a line.

    Raises:
        click.UsageError: A command or option that there is not.
    """
    command: click.Command = main
    rest = words[1:]
    while isinstance(command, click.Group):
        context = click.Context(command)
        name, chosen, rest = command.resolve_command(context, rest)
        assert chosen is not None, name
        command = chosen
    return command.make_context(command.name, rest)


EVERY = [
    pytest.param(words, id=f"{page.name}: {' '.join(words[:4])}")
    for page in PAGES
    for words in commands(page)
]


def test_the_pages_have_commands() -> None:
    assert len(EVERY) > 40
    with pytest.raises(click.UsageError):
        parsed(shlex.split("detr bench run x.bundle --data kitti:x --budget 3"))


@pytest.mark.parametrize("words", EVERY)
def test_commands_are_typed_right(words: list[str]) -> None:
    context = parsed(words)
    if words[1] == "distill" and words[2] in ("train", "run", "compare"):
        from distill.recipe import find_recipe, load_recipe

        load_recipe(find_recipe(context.params["recipe"]), context.params["overrides"])


def test_the_readme_is_short() -> None:
    assert len(README.split()) < 1400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader stands: a bundle of the demo teacher and a picture of a road."""
    from detr.data.synth import generate

    path = tmp_path_factory.mktemp("reader")
    command = ["export", "onnx", "demo-teacher", "--out", str(path / "student.bundle")]
    done = CliRunner().invoke(main, [*command, "--no-verify"])
    assert done.exit_code == 0, done.output
    generate(path / "scenes", 1, (96, 320), seed=3)
    picture = next((path / "scenes/training/image_2").iterdir())
    picture.rename(path / "road.png")
    return path


def run(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.mark.slow
def test_five_lines_find_objects(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (b for b in blocks(README, "python") if "open_engine" in b)
    names = run(block, folder, monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(names["detections"]) > 0
    assert {line.split()[0] for line in printed} <= {"Car", "Van", "Truck", "Pedestrian", "Cyclist"}


@pytest.mark.slow
def test_five_lines_build_a_detector_and_run_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (b for b in blocks(README, "python") if "build_detector" in b)
    import torch

    torch.manual_seed(0)
    detector = run(block, tmp_path, monkeypatch)["detector"]
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    # Class, box and backbone: the step reaches all of the detector.
    for part in ("backbone.", "encoder.", "decoder.layers.0.", "decoder.class_heads", "source."):
        reached = [g.abs().sum() for name, g in gradients.items() if name.startswith(part)]
        assert reached and max(reached) > 0, part


def test_both_blocks_are_five_lines_beside_imports_and_data() -> None:
    for block in blocks(README, "python"):
        last = block.rstrip().split("\n\n")[-1].splitlines()
        assert len(last) <= 5, last


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    paths = re.findall(rf"`((?:{ROOMS})/[\w./-]+\.\w+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    # NAME stands for what a contributor chooses.
    missing += [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_the_table_of_methods_names_what_there_is() -> None:
    """Files relative to the methods, and test functions, an ellipsis after the beginning of one."""
    text = (ROOT / "docs/methods.md").read_text()
    folders = [ROOT] + [
        ROOT / f"{top}distill/methods{part}" for top in ("", "tests/") for part in ("", "/parts")
    ]
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    missing = []
    for token in sorted(set(re.findall(r"`([^`\n]+)`", text))):
        if token.endswith((".py", ".cpp")) and not any((x / token).exists() for x in folders):
            missing.append(token)
        elif re.fullmatch(r"test_\w+(\.\.\.)?", token) and token not in tests:
            start = token.removesuffix("...")
            if start == token or not any(name.startswith(start) for name in tests):
                missing.append(token)
    assert not missing
