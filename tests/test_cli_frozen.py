"""The command line is a promise: a change here is a change of the public interface."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from detr.cli import main
from detr.cli_support import Number, progress

FROZEN = Path(__file__).with_name("cli.json")


def signature(command: click.Command, context: click.Context) -> dict[str, object]:
    if isinstance(command, click.Group):
        described: dict[str, object] = {}
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            described[name] = signature(child, click.Context(child, parent=context, info_name=name))
        return described
    return {
        "parameters": sorted(
            "/".join([*p.opts, *p.secondary_opts]) + ("..." if p.multiple or p.nargs == -1 else "")
            for p in command.params
        )
    }


def leaves(command: click.Command, context: click.Context) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(context.command_path, command)]
    found = []
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        found += leaves(child, click.Context(child, parent=context, info_name=name))
    return found


def test_command_line_is_frozen() -> None:
    now = signature(main, click.Context(main, info_name="detr"))
    assert now == json.loads(FROZEN.read_text()), (
        "the command line changed; if that is meant, write it down in cli.json and CHANGELOG.md"
    )


@pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(p, c, id=p) for p, c in leaves(main, click.Context(main, info_name="detr"))],
)
def test_every_verb_shows_an_example(path: str, command: click.Command) -> None:
    assert command.help and "Example:" in command.help
    assert path.split()[-1] in command.help.split("Example:")[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["detr", "distill", "export", "bench"])
def test_scripts_are_installed(script: str) -> None:
    run = subprocess.run(
        [str(Path(sys.executable).with_name(script)), "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "Commands" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "run", "s.bundle", "--dta", "kitti:k"], "No such option '--dta'"),
        (["bench", "run", "s.bundle"], "Missing option '--data'"),
        (["bench", "rnu"], "No such command 'rnu'"),
        (["data", "synth", "out", "--images", "many"], "'many' is not a valid integer"),
    ],
)
def test_a_misspelt_command_line_is_one_line_too(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(arguments, prog_name="detr")
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert told.startswith("error[usage]: ") and said in told and told.count("\n") == 1
    assert told.rstrip().endswith("--help")


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt(), RuntimeError("from core.cpp:\nKeyboardInterrupt: <EMPTY>")]
)
def test_an_interrupted_command_says_so_and_no_more(
    raised: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise raised

    monkeypatch.setattr("detr.data.open.open_dataset", interrupted)
    with pytest.raises(SystemExit) as caught:
        main.main(["data", "check", "kitti:k"], prog_name="detr")
    assert caught.value.code == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


def test_progress_in_a_log_file_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress(range(2), "looking")
    bar.delay, bar.mininterval = 0, 0
    assert list(bar) == [0, 1]
    told = capsys.readouterr().err
    assert "\r" not in told and "looking" in told and told.endswith("\n")


def test_a_users_mistake_is_one_line_and_status_2() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "detr", "data", "check", "kitti:/nowhere:val"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error[") and run.stderr.count("\n") == 1
    assert "/nowhere" in run.stderr


def test_every_number_has_an_end() -> None:
    """Click's own ranges let ``nan`` pass, and a budget of ``nan`` is held by nothing."""
    told = []
    for path, command in leaves(main, click.Context(main, info_name="detr")):
        for parameter in command.params:
            if isinstance(parameter.type, click.types.FloatParamType):
                assert isinstance(parameter.type, Number), (path, parameter.name)
                for text in ("nan", "inf", "-inf"):
                    with pytest.raises(click.BadParameter):
                        parameter.type.convert(text, parameter, None)
                told.append(f"{path} {parameter.opts[0]}")
    assert "detr bench fit --budget-ms" in told and "detr data split --val" in told
