"""The command `theworld-train`: the table of its commands, which are imported only when they are called."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from theworld_train.cli.completion import Completion, complete_values
from theworld_train.cli.exit_codes import INTERRUPTED, INTERRUPTED_LINE, with_exit_codes

if TYPE_CHECKING:
    # Typer has no public name for the classes under its own; they are needed for types alone.
    from typer._click import Command as AnyCommand
    from typer._click import Context, HelpFormatter

PROGRAM = "theworld-train"
#: Set for the processes that a command starts, which all get a Ctrl-C too: the command alone says so.
_INSIDE = "THEWORLD_TRAIN_INSIDE"


class CommandEntry(NamedTuple):
    """A command in the table.

    Attributes:
        target: `module:function`; the function's docstring is the command's help and ends with an `Example:`.
        help: What the list of commands says.
    """

    target: str
    help: str


#: Every command, a line each, in the order of the list of commands.
COMMANDS: dict[str, CommandEntry] = {
    "train": CommandEntry("theworld_train.cli.train:train", "Train one stage."),
    "launch": CommandEntry("theworld_train.cli.launch:launch", "Train one stage on several processes or machines."),
    "run": CommandEntry("theworld_train.cli.run:run", "Run the stages of a pipeline one after the other."),
    "sweep": CommandEntry("theworld_train.cli.sweep:sweep", "Search over keys of a stage or pipeline, many trials."),
    "evaluate": CommandEntry("theworld_train.cli.evaluate:evaluate", "Measure a checkpoint, with ablations."),
    "report": CommandEntry("theworld_train.cli.report:report", "Report on a run, a pipeline or a sweep, as one page."),
    "generate": CommandEntry("theworld_train.cli.generate:generate", "Answer a question about an image or a clip."),
    "checkpoint": CommandEntry("theworld_train.cli.checkpoint:checkpoint", "List, verify, show or prune checkpoints."),
    "export": CommandEntry("theworld_train.cli.export:export", "Write a checkpoint as a Hugging Face directory."),
    "fetch": CommandEntry("theworld_train.cli.fetch:fetch", "Download models and data, once, and pin their revisions."),
    "prepare": CommandEntry(
        "theworld_train.cli.prepare:prepare", "Fetch the images that rows name by URL, for training."
    ),
    "encode": CommandEntry("theworld_train.cli.encode:encode", "Keep what frozen encoders make of a run's media."),
    "rollout": CommandEntry("theworld_train.cli.rollout:rollout", "Generate what follows the pictures of a run."),
    "plan": CommandEntry("theworld_train.cli.plan:plan", "Plan a run's memory, and say whether it fits a GPU."),
    "data": CommandEntry("theworld_train.cli.data:data", "Count the tokens of a run's data, and show its samples."),
    "profile": CommandEntry("theworld_train.cli.profile:profile", "Measure where the time and memory of steps go."),
    "params": CommandEntry("theworld_train.cli.params:params", "Count every parameter of a run, by component."),
    "init": CommandEntry("theworld_train.cli.init:init", "Write a project of your own: configs, data, next commands."),
    "doctor": CommandEntry("theworld_train.cli.doctor:doctor", "Check that this machine is ready, and say what to do."),
    "tiny": CommandEntry("theworld_train.cli.tiny:tiny", "Write the quickstart's tiny model."),
    "validate": CommandEntry("theworld_train.cli.validate:validate", "Check run configs, pipelines and sweeps."),
    "size": CommandEntry("theworld_train.cli.size:size", "Count the parameters, memory and compute of any model."),
    "figures": CommandEntry("theworld_train.cli.figures:figures", "Compare published figures with what is true."),
    "schema": CommandEntry("theworld_train.cli.schema:schema", "Print the JSON Schema of the configs, for editors."),
}


class LazyGroup(TyperGroup):
    """Group whose commands are modules that are imported when called, so that `--help` waits for no torch."""

    def list_commands(self, ctx: Context) -> list[str]:
        """Returns the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> AnyCommand | None:
        """Imports a command's module and makes the command of its function."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Writes the list of commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: Context, incomplete: str) -> list[Any]:
        """Completes options and the names of commands, from the table, without importing them."""
        names = [Completion(name, COMMANDS[name].help) for name in COMMANDS if name.startswith(incomplete)]
        return [*names, *TyperCommand.shell_complete(self, ctx, incomplete)]  # not those of a group, which imports all

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, AnyCommand | None, list[str]]:
        """Finds the command that is called; an unknown name is answered with the nearest known one."""
        if args[0] not in COMMANDS:
            from theworld_train.config.errors import did_you_mean

            ctx.fail(f"no such command '{args[0]}'; {did_you_mean(args[0], list(COMMANDS)) or f'see {PROGRAM} --help'}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Context) -> object:
        """Runs a command; a user's error ends it with a list of problems, another exception keeps its traceback."""
        outermost = _INSIDE not in os.environ and os.environ.get("RANK", "0") == "0"
        before = os.environ.setdefault(_INSIDE, str(os.getpid()))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if outermost:
                typer.echo(INTERRUPTED_LINE, err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # Imported here, as it takes pydantic along: only a failure needs it.
            from theworld_train.cli.problems import exit_if_config_error

            exit_if_config_error(error)
            raise
        finally:
            if before == str(os.getpid()):
                os.environ.pop(_INSIDE, None)  # a command may have put the environment back


def load_command(name: str) -> AnyCommand:
    """Imports a command of the table.

    Args:
        name: The command's name.

    Returns:
        The command, whose help is the docstring of its function.
    """
    module, _, attribute = COMMANDS[name].target.partition(":")
    function: Callable[..., object] = getattr(import_module(module), attribute)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=_help_text(function), short_help=COMMANDS[name].help)(function)
    command: AnyCommand = typer.main.get_command(single)
    complete_values(command)
    return command


def _help_text(function: Callable[..., object]) -> str:
    """Returns a function's docstring with its exit codes complete and the line breaks of its example kept."""
    text = with_exit_codes(inspect.getdoc(function) or "")
    return re.sub(r"^(?=Examples?:$)", "\b\n", text, flags=re.MULTILINE)


def _print_version(asked: bool) -> None:
    if asked:
        from theworld_train import __version__

        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


# Typer's own tracebacks would take rich along and leave frames out.
app = typer.Typer(
    name=PROGRAM,
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"\b\nExample:\n    {PROGRAM} validate configs/stages/projection.yaml optimizer.lr=3e-4",
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train TheWorld, a vision-language-world model, from YAML configs."""


def main() -> None:
    """Runs the command line."""
    app(prog_name=PROGRAM)
