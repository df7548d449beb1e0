"""What every command line of the project shares: errors, lazy groups, JSON output, progress."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import click
from pydantic import BaseModel
from tqdm import tqdm

from detr.cores import let_threads_sleep, use_threads
from detr.errors import UserError

T = TypeVar("T")

# Every command imports this module before it imports torch.
let_threads_sleep()

# What to install when a room's import fails; keyed by the missing module.
_EXTRA_OF_MODULE = {
    name: "train" for name in ("torch", "torchvision", "timm", "safetensors", "scipy", "onnxscript")
} | {
    "av": "video",
    "transformers": "hf",
    **{name: name for name in ("mlflow", "ray", "supervision", "tensorboard", "wandb")},
}


class Group(click.Group):
    """A click group that tells a user's mistake in one line and never as a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command line; see :meth:`click.Command.main`."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.exit(status if isinstance(status, int) else 0)
        except UserError as error:
            click.echo(str(error), err=True)
            sys.exit(error.exit_status)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            told = _usage(error)
            click.echo(str(told), err=True)
            sys.exit(told.exit_status)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except ModuleNotFoundError as error:
            # What no extra brings is a defect of ours and keeps its traceback.
            told = missing_extra(error, "this command")
            click.echo(str(told), err=True)
            sys.exit(told.exit_status)
        except click.Abort:
            _interrupted()
        except RuntimeError as error:
            # A runtime that calls our operators hands Ctrl-C on as an exception of its own.
            if "KeyboardInterrupt" not in str(error):
                raise
            _interrupted()


def _interrupted() -> NoReturn:
    """Ends with the shell's own number for a program ended by SIGINT."""
    click.echo("interrupted", err=True)
    sys.exit(130)


def _usage(error: click.UsageError) -> UserError:
    """Click tells a misspelt option in four lines; this is the same in one."""
    message = " ".join(error.format_message().split()).rstrip(".")
    command = "detr" if error.ctx is None else error.ctx.command_path
    return UserError("usage", f"{message}; see {command} --help")


class LazyGroup(Group):
    """A group whose further commands are imported when they are used.

    Keeps ``detr data check`` free of torch, and rooms free of imports of each other.

    Args:
        lazy: Command name to ``module:attribute`` and the line `--help` shows, which must not
            need the import either.
    """

    def __init__(
        self, *args: Any, lazy: dict[str, tuple[str, str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The named command, imported if need be.

        Raises:
            UserError: ``extra-missing`` where the command needs a package that is not installed.
        """
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute = self._lazy[cmd_name][0].split(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise missing_extra(error, f"{ctx.info_name} {cmd_name}") from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        rows = []
        for name in self.list_commands(ctx):
            if name in self._lazy:
                rows.append((name, self._lazy[name][1]))
            elif (command := super().get_command(ctx, name)) is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(limit=80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def missing_extra(error: ModuleNotFoundError, needed_by: str) -> UserError:
    """The one-line error for a package that an extra would install."""
    name = (error.name or "").split(".")[0]
    extra = _EXTRA_OF_MODULE.get(name)
    if extra is None:
        raise error
    return UserError(
        "extra-missing",
        f"{needed_by} needs {name}: pip install 'detr-distillery[{extra}]'",
    )


class Number(click.FloatRange):
    """A number in a range; ``nan`` and ``inf``, which click's ranges let pass, are none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """See :meth:`click.ParamType.convert`."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Of the engine; by default OMP_NUM_THREADS, what a container may use, or all cores.",
)


def _use_threads(_: click.Context, __: click.Parameter, number: int | None) -> None:
    if number is not None:
        use_threads(number)


# For commands that use torch and engines by turns: nothing is handed on, the process keeps it.
process_threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    callback=_use_threads,
    expose_value=False,
    help="Of torch and engines; default: OMP_NUM_THREADS, what a container may use, or all cores.",
)


def emit(result: BaseModel | dict[str, Any] | Sequence[Any], as_json: bool, text: str) -> None:
    """Prints a result on standard output: JSON if asked for, else ``text``."""
    if not as_json:
        click.echo(text)
    elif isinstance(result, BaseModel):
        click.echo(result.model_dump_json(indent=2))
    else:
        click.echo(json.dumps(result, indent=2))


class _Lines:
    """Where a log file or a pipe takes the place of a terminal: a line each time, no redrawing."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable[T], description: str, total: int | None = None) -> tqdm[T]:
    """A progress bar on standard error; a line now and then where that is not a terminal."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=description,
        total=total,
        file=sys.stderr if terminal else _Lines(),
        dynamic_ncols=terminal,
        leave=False,
        mininterval=0.2 if terminal else 10.0,
        delay=1.0,  # what is done within a second, or fails at once, needs no bar
    )


def counted(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """Splits repeated ``key=value`` options.

    Raises:
        UserError: ``option-form`` where one has no ``=``.
    """
    result = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise UserError("option-form", f"{option} {value!r}: expected key=value")
        result[key] = text
    return result
