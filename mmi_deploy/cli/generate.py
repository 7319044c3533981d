"""`mmi generate`: continue a document, streamed to the terminal and written to a folder."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmi_deploy.cli.console import MOST_THREADS, print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder, spelled
from mmi_deploy.cli.target_options import (
    Device,
    Kernels,
    Resident,
    TargetName,
    check_engines,
    resident_groups,
)
from mmi_deploy.hub.kinds import BUNDLE as BUNDLE_KIND
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.progress import Progress, shown, silent

if TYPE_CHECKING:
    from mmi_deploy.cli.machine import Machine
    from mmi_deploy.documents.document import Document
    from mmi_deploy.runtime.events import Event
    from mmi_deploy.runtime.options import GenerationOptions

BUNDLE = Path("bundles/tiny")

# Seconds before the denoising steps of a picture are logged.
PATIENCE = 5.0


def generate(
    documents: Annotated[
        list[Path],
        typer.Argument(
            help="Markdown or JSON document, several of them, or one JSONL with a document in each "
            "line.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Output folder: story.md, pictures and index.html. Of several documents: a folder "
            "in it for each, called like the document. Of a JSONL: the JSONL of its results.",
            rich_help_panel="Document",
        ),
    ] = Path("out"),
    bundle: Annotated[
        Path,
        typer.Option(
            "--bundle",
            "-b",
            help="Bundle of `mmi export`, or hf://org/name.",
            rich_help_panel="Document",
        ),
    ] = BUNDLE,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Random seed; same seed, same story.",
            metavar="N",
            rich_help_panel="Document",
        ),
    ] = 0,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Maximum number of new text tokens.", metavar="N", rich_help_panel="Text"
        ),
    ] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Sampling temperature; 0 is greedy.",
            metavar="X",
            show_default="1.0, with --beams 0",
            rich_help_panel="Text",
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(
            min=0,
            help="Sample from the k most likely tokens; 0: all.",
            metavar="N",
            rich_help_panel="Text",
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Nucleus sampling: probability mass to keep.", metavar="X", rich_help_panel="Text"
        ),
    ] = 0.9,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            help="Above 1 penalises repeated tokens.", metavar="X", rich_help_panel="Text"
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Drop tokens less than X times as likely as the most likely one.",
            metavar="X",
            rich_help_panel="Text",
        ),
    ] = 0.0,
    presence_penalty: Annotated[
        float,
        typer.Option(
            help="Subtracted from the logits of tokens of the turn so far, -2 to 2.",
            metavar="X",
            rich_help_panel="Text",
        ),
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            help="The same for each time that a token came, -2 to 2.",
            metavar="X",
            rich_help_panel="Text",
        ),
    ] = 0.0,
    beams: Annotated[
        int,
        typer.Option(
            min=1,
            help="Keep the best of N texts that grow side by side (beam search); 1: none.",
            metavar="N",
            rich_help_panel="Text",
        ),
    ] = 1,
    length_penalty: Annotated[
        float,
        typer.Option(
            help="Of --beams: above 0 favours long texts.",
            metavar="X",
            rich_help_panel="Text",
        ),
    ] = 1.0,
    biases: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-bias",
            help="Add BIAS, -100 to 100, to the logit of token ID; may be repeated.",
            metavar="ID=BIAS",
            show_default=False,
            rich_help_panel="Text",
        ),
    ] = None,
    max_images: Annotated[
        int,
        typer.Option(
            min=0, help="Maximum number of new pictures.", metavar="N", rich_help_panel="Pictures"
        ),
    ] = 4,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:STEPS",
            help="Sampler of the bundle, such as ddim:20.",
            rich_help_panel="Pictures",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Classifier-free guidance scale; 1 is off.",
            show_default="3.5, or as distilled",
            metavar="X",
            rich_help_panel="Pictures",
        ),
    ] = None,
    full_every: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Run the whole U-Net in every Nth step and reuse its deep features in between: "
            "faster, less accurate.",
            rich_help_panel="Pictures",
        ),
    ] = 1,
    target: TargetName = CPU,
    device: Device = 0,
    resident: Resident = None,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_THREADS,
            help="CPU threads; 0: one per core.",
            metavar="N",
            rich_help_panel="Machine",
        ),
    ] = 0,
    kernels: Kernels = AUTO,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Documents at once, where several are given.",
            metavar="N",
            show_default="as many as the memory holds",
            rich_help_panel="Machine",
        ),
    ] = None,
    unproved: Annotated[
        bool,
        typer.Option(
            "--unproved", help="Run engines that have no receipt.", rich_help_panel="Machine"
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace an output folder that mmi wrote for another purpose."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the result as JSON, without streaming; of several documents, a line each.",
        ),
    ] = False,
) -> None:
    """Continue a document: the model writes text and draws pictures.

    Picture links in Markdown are shown to the model; ![]() asks it to draw one there. Several
    documents are generated at once, each as it would be alone.
    """
    with extras("generate"):
        from mmi_deploy.cli.generate_lines import generate_lines, is_lines
        from mmi_deploy.cli.generate_many import generate_many
        from mmi_deploy.cli.machine import Machine
        from mmi_deploy.runtime.options import GenerationOptions

        check_engines(target)
    options = GenerationOptions(
        seed=seed,
        max_images=max_images,
        max_tokens=max_tokens,
        temperature=float(beams == 1) if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_logit_bias(biases or []),
        beams=beams,
        length_penalty=length_penalty,
        schedule=schedule,
        guidance=guidance,
        full_every=full_every,
    )
    folder = local_folder(bundle, BUNDLE_KIND, targets=[target])
    groups = resident_groups(resident)
    machine = Machine(
        folder, target, kernels, threads, device, groups, slots, unproved, spelled(bundle)
    )
    if len(documents) > 1:
        generate_many(documents, out, machine, options, force, as_json)
    elif is_lines(documents[0]):
        generate_lines(documents[0], out, machine, options, force, as_json)
    else:
        _generate_one(documents[0], out, machine, options, force, as_json)


def _generate_one(
    document: Path,
    out: Path,
    machine: Machine,
    options: GenerationOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Generate one document into the folder `out`, shown as it is written."""
    from mmi_deploy.cli.generate_output import Output
    from mmi_deploy.documents.files import read_document
    from mmi_deploy.documents.story import PAGE_NAME
    from mmi_deploy.runtime.generation import generate as events_of
    from mmi_deploy.system.output_folder import check_replaceable, new_folder

    inputs = (document, machine.bundle)
    check_replaceable(out, force, kind="story", inputs=inputs)  # fail before minutes of work
    started = time.perf_counter()
    opened = machine.open_bundle()
    images = min(opened.limits.images, opened.config.llm_mmfs.images - 1)
    source = read_document(document, opened.limits.context, images)
    before = time.perf_counter()
    kernels = machine.find_kernels()
    started += time.perf_counter() - before  # compiled once per machine: not loading time
    runtime = machine.open_runtime(opened, kernels, options.beams)
    output = Output(source, runtime, options)
    events = events_of(runtime, source, options)  # refuses the document before it is shown
    with new_folder(out, force, kind="story", inputs=inputs) as work:
        view = _Silent() if as_json else _Terminal(source)
        with view:
            for event in events:
                output.add(event)
                view.show(event)
        runtime.close()
        seconds = time.perf_counter() - started
        spent = f"{seconds:.1f} s, loading included"
        output.write(work, document, machine.called, machine.target, spent)
    if as_json:
        print_json(output.report(out, seconds))
    else:
        remarks().print(f"\n{output.summary(seconds)}\nRead it in {out / PAGE_NAME}")


def _logit_bias(given: list[str]) -> dict[int, float]:
    """Values of --logit-bias, ID=BIAS each, as a mapping."""
    from mmi_deploy.errors import ConfigError

    bias: dict[int, float] = {}
    for pair in given:
        token, _, number = pair.partition("=")
        try:
            value = float(number)
            identifier = int(token)
        except ValueError:
            raise ConfigError(
                "--logit-bias is malformed", expected="ID=BIAS, as 13=-100", got=pair
            ) from None
        if identifier in bias:
            raise ConfigError("--logit-bias is given twice for a token", got=pair)
        bias[identifier] = value
    return bias


class _Silent:
    """View that shows nothing, for --json."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, event: Event) -> None:
        return None


class _Terminal(_Silent):
    """Stream the document to stdout, with a progress bar per picture on stderr."""

    def __init__(self, document: Document) -> None:
        self._out, self._err = results(), remarks()
        self._given = iter(document.parts)
        self._drawing = ExitStack()
        self._progress: Progress = silent
        self._picture = ""
        self._in_line = False
        self._show_given()

    def __exit__(self, *_: object) -> None:
        self._drawing.close()
        self._end_line()

    def show(self, event: Event) -> None:
        from mmi_deploy.runtime.events import ImageDone, ImageProgress, ImageStarted, TextDelta

        match event:
            case TextDelta(text):
                self._write(text)
            case ImageStarted(index, steps):
                self._end_line()
                self._picture = f"drawing picture {index + 1}"
                self._progress = self._drawing.enter_context(
                    shown(self._err, self._picture, patience=PATIENCE)
                )
                self._progress(self._picture, 0, steps)
            case ImageProgress(_, step, steps):
                self._progress(self._picture, step, steps)
            case ImageDone(index, _):
                self._drawing.close()
                self._line(f"[picture {index + 1}: drawn]")
                self._show_given()

    def _show_given(self) -> None:
        """Print the parts of the document up to the next picture to draw."""
        from mmi_deploy.documents.document import Draw, Text

        for part in self._given:
            if isinstance(part, Draw):
                return
            if isinstance(part, Text):
                self._write(part.text, style="dim")
            else:
                self._line("[picture: given]", style="dim")

    def _write(self, text: str, style: str = "") -> None:
        self._out.print(text, end="", style=style)
        self._out.file.flush()
        self._in_line = True

    def _line(self, text: str, style: str = "") -> None:
        self._end_line()
        self._out.print(text, style=style)

    def _end_line(self) -> None:
        if self._in_line:
            self._out.print()
            self._in_line = False
