"""`mmi verify`: is a bundle whole, proved, and does it run?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import DownloadColumn

from mmi_deploy.cli.console import counted, print_json, progress, remarks, results
from mmi_deploy.cli.extras import extras


def verify(
    bundle: Annotated[Path, typer.Argument(help="What `mmi export` wrote.")] = Path("bundles/tiny"),
    run: Annotated[
        bool, typer.Option("--run", help="Also draw a picture and read it, a few seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hash every file of a bundle again and check that every graph has a receipt.

    A receipt says against what a graph was compared, and with what error. With --run every graph
    runs once too, and numbers that are not finite are an error.
    """
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.bundle.manifest import Hashes

    with progress(remarks(), DownloadColumn()) as bar:
        task = bar.add_task("hashing", total=None)

        def tell(path: Path, done: int, size: int) -> None:
            bar.update(task, description=f"hashing {path.name}", completed=done, total=size)

        hashes = Hashes(tell)
        opened = Bundle.open(bundle, hashed=hashes)
        unproved = opened.verify(hashes)
    manifest = opened.manifest
    found: dict[str, Any] = {
        "bundle": str(bundle),
        "files": len(manifest.files),
        "receipts": len(manifest.receipts),
        "targets": list(opened.targets),
        "targets_without_receipts": list(unproved),
    }
    if run:
        with extras("verify"):
            from mmi_deploy.runtime.runtime import Runtime
        if not as_json:
            remarks().print("running every graph ...")
        found["tokens"], found["pictures"] = _smoke(Runtime.open(opened))
    if as_json:
        print_json({"ok": True, **found})
        return
    line = f"{bundle} is whole: {counted(found['files'], 'file')} unchanged, "
    line += counted(found["receipts"], "receipt")
    if opened.targets:
        line += f", {counted(len(opened.targets), 'target')}"
    if run:
        wrote = counted(found["tokens"], "token"), counted(found["pictures"], "picture")
        line += f"; wrote {wrote[0]} and drew {wrote[1]}"
    results().print(line)
    for remark in opened.remarks:
        remarks().print(remark)
    if unproved:
        names = ", ".join(unproved)
        remarks().print(
            f"never run, and so without receipts: {names}. `make gpu-check` runs them on the card"
        )


def _smoke(runtime: Any) -> tuple[int, int]:
    """Draw a picture from nothing, read it, and write a little: every graph runs."""
    from mmi_deploy.documents.document import Draw, document_of
    from mmi_deploy.runtime.events import Finished
    from mmi_deploy.runtime.generation import GenerationOptions, generate

    options = GenerationOptions(max_images=0, max_tokens=4, min_tokens=4)
    *_, last = generate(runtime, document_of(Draw()), options)
    assert isinstance(last, Finished), "generate ends with Finished"
    return last.tokens, last.images
