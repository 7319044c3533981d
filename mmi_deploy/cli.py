"""`mmi`: one command per stage, each importing its part only when it is called.

Exit codes: 0 done; 2 something that the user can mend, said in one line; 1 a fault of ours; 130
stopped by Ctrl-C; 143 stopped by SIGTERM.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from mmi_deploy.commands.bench import bench
from mmi_deploy.commands.build import build
from mmi_deploy.commands.convert import convert
from mmi_deploy.commands.evaluate import evaluate
from mmi_deploy.commands.export import export
from mmi_deploy.commands.generate import generate
from mmi_deploy.commands.init import init
from mmi_deploy.commands.inspect import inspect
from mmi_deploy.commands.plugins import app as plugins
from mmi_deploy.commands.train import train
from mmi_deploy.commands.verify import verify
from mmi_deploy.errors import MmiError

STOPPED = 128 + signal.SIGINT

_signals: list[int] = []
"""Those that asked us to stop."""

app = typer.Typer(
    name="mmi",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mmi {installed_version('mmi_deploy')}")
        raise typer.Exit


@app.callback(
    epilog="First steps:  mmi export assets/tiny -o bundles/tiny  ·  "
    "mmi generate examples/story.md -o out  ·  open out/index.html"
)
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Read and write interleaved text and pictures: train, export, run and measure MM-Interleaved.

    `mmi COMMAND --help` explains each command, with examples.
    """


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are one line on stderr."""
    try:
        code = app(arguments, prog_name="mmi", standalone_mode=False)
        code = code if isinstance(code, int) else 0
        return _stopped() if code == STOPPED else code
    except TyperException as error:
        line = " ".join(error.format_message().split()).rstrip(".")
        if not line:
            return 2  # the help is on the screen
        context = getattr(error, "ctx", None)
        return _say(f"{line}. See `{context.command_path if context else 'mmi'} --help`", 2)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return _stopped() if code == STOPPED else code
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `mmi ... | head` is fine
        return 0
    except MmiError as error:
        return _say(str(error), error.exit_code)
    except Exception as error:
        if _signals:  # a library made an error of its own of it, as imports do
            return _stopped()
        if "--debug" in arguments:
            raise
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if _disk_is_full(error):
        return _say("the disk is full. Free some space and run the command again", 2)
    if isinstance(error, OSError) and error.filename:
        return _say(f"{error.filename}: {error.strerror}", 2)
    line = " ".join(str(error).split()) or "no message"
    return _say(
        f"unexpected {type(error).__name__}: {line}. Run it again as `mmi --debug ...` and report "
        "the traceback",
        1,
    )


def _disk_is_full(error: Exception) -> bool:
    """Libraries that are not Python's own say it in their text alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    known = isinstance(error, OSError) and error.errno in full
    return known or any(os.strerror(number) in str(error) for number in full)


def _say(line: str, code: int) -> int:
    print(f"mmi: {line}", file=sys.stderr)
    return code


def _stopped() -> int:
    return _say("stopped", 128 + _signals[0] if _signals else STOPPED)


def _stop(number: int, _: object) -> None:
    _signals.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """The program. SIGTERM ends it as Ctrl-C does, so that temporary files go."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a letter
    sys.exit(run(sys.argv[1:]))


app.command(
    epilog="Examples:  mmi train -o runs/tiny  ·  mmi train -o runs/trial --steps 100  ·  "
    "mmi train -o runs/more --start assets/tiny --world medium"
)(train)
app.command(
    epilog="Examples:  mmi convert mm_interleaved_13b/ -o models/13b --tokenizer vicuna-13b/  ·  "
    "mmi convert mm_interleaved_13b/ -o models/13b --tokenizer vicuna-13b/ --dtype bfloat16"
)(convert)
app.command(
    epilog="Examples:  mmi init -o models/mine --llm SmolLM2-135M/ --vision clip-base-patch16/  ·  "
    "mmi init -o models/mine --llm smollm2.gguf --context 2048"
)(init)
app.command(epilog="Example:  mmi evaluate assets/tiny --count 32")(evaluate)
app.command(
    epilog="Examples:  mmi export assets/tiny -o bundles/tiny  ·  "
    "mmi export runs/tiny/model -o bundles/mine --schedule unipc:10 --schedule ddim:50"
)(export)
app.command(
    epilog="Examples:  mmi build --target cpu --precision int8  ·  "
    "mmi build bundles/tiny --arch sm89 --arch sm120  ·  mmi build --arch sm80 --dry-run"
)(build)
app.command(
    epilog="Examples:  mmi generate examples/story.md -o out  ·  "
    "mmi generate story.md --seed 7 --max-images 2 --temperature 0.7  ·  "
    "mmi generate story.md --json | jq .parts"
)(generate)
app.command(
    epilog="Examples:  mmi bench --quick  ·  mmi bench bundles/tiny -m assets/tiny -o bench.json "
    "--plot bench.svg"
)(bench)
app.add_typer(plugins, name="plugins")
app.command(
    epilog="Examples:  mmi inspect bundles/tiny --tensors  ·  mmi inspect assets/tiny  ·  "
    "mmi inspect --preset released_13b  ·  mmi inspect bundles/tiny --cost --graph llm  ·  "
    "mmi inspect bundles/tiny --memory  ·  mmi inspect bundles/tiny --fit 24GB"
)(inspect)
app.command(epilog="Example:  mmi verify bundles/tiny --run")(verify)
