"""`mmi`: one command per stage, each importing its part only when it is called.

Exit codes: 0 done; 2 something that the user can mend, said in one line; 1 a fault of ours; 130
stopped by Ctrl-C; 143 stopped by SIGTERM.
"""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from mmi_bench.cli import bench
from mmi_deploy.cli import program
from mmi_deploy.cli.build import build
from mmi_deploy.cli.generate import generate
from mmi_deploy.cli.inspect.app import inspect
from mmi_deploy.cli.verify import verify
from mmi_export.cli import export
from mmi_plugins.cli import app as plugins
from mmi_train.cli.convert import convert
from mmi_train.cli.evaluate import evaluate
from mmi_train.cli.init import init
from mmi_train.cli.train import train

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
        return program.run(app, "mmi", arguments)
    except Exception as error:
        if "--debug" in arguments:
            raise
        line = " ".join(str(error).split()) or "no message"
        return program.say(
            f"unexpected {type(error).__name__}: {line}. Run it again as `mmi --debug ...` and "
            "report the traceback",
            1,
        )


def main() -> None:
    """The program."""
    program.main(run)


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
app.command(
    epilog="Examples:  mmi verify bundles/tiny --run  ·  "
    "mmi verify bundles/tiny --target tensorrt-sm89-fp16  ·  "
    "mmi verify bundles/tiny --target cpu-int8 --json"
)(verify)
