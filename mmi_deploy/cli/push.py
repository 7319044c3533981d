"""`mmi push`: upload a bundle or a model folder to the Hugging Face Hub, with a model card."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import counted, print_json, print_table, remarks, results
from mmi_deploy.cli.hub_folders import local_only, require_hub
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.reference import is_reference, parse
from mmi_deploy.system.files import size
from mmi_deploy.system.progress import shown

if TYPE_CHECKING:
    from mmi_deploy.hub.upload import Upload

# Seconds before hashing is logged; most folders take less.
PATIENCE = 5.0

# Names of files and of others that one line shows.
_SHOWN = 5

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def push(
    folder: Annotated[
        Path,
        typer.Argument(help="Bundle, or model folder, that mmi wrote.", metavar="BUNDLE|MODEL"),
    ],
    repository: Annotated[
        str,
        typer.Argument(
            help="Repository, and branch if not main: hf://org/name@branch. New ones are created.",
            metavar="hf://",
        ),
    ],
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Create the repository as a private one; refuse a public one."
        ),
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(help="Message of the commit.", metavar="TEXT", show_default="what it holds"),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="License in the model card that is written, such as apache-2.0.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the files and the card; use no network, upload nothing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload a bundle or a model folder to the Hugging Face Hub: one commit, which deletes nothing.

    Every file is hashed first. What the manifest lists is uploaded, and nothing else of the folder
    but a README.md, which is the model card as it is; without one, a card is written from the
    manifest and the receipts. The login is that of `hf auth login`, or HF_TOKEN.
    """
    if not is_reference(repository):
        raise ConfigError(
            "uploads go to the Hugging Face Hub", expected="hf://org/name[@branch]", got=repository
        )
    local_only(folder, "uploads are of folders that mmi wrote here")
    reference = parse(repository)
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(
            "--license is no identifier of the Hub", expected="such as apache-2.0", got=license
        )
    if message is not None and not message.strip():
        raise ConfigError("--message is empty", fix="leave it out for the usual one")
    from mmi_deploy.hub.push import check_destination, check_login
    from mmi_deploy.hub.push import push as upload_to
    from mmi_deploy.hub.upload import upload_of

    check_destination(reference)
    if not dry_run:
        require_hub()
        check_login()  # before minutes of hashing
    with shown(remarks(), "hashing", patience=PATIENCE) as progress:
        upload = upload_of(folder, reference, license=license, progress=progress)
    if license is not None and upload.own_card:
        raise ConfigError(
            f"{folder} has a README.md, which is uploaded as it is",
            fix="leave --license out, and write `license:` into its front matter",
        )
    if upload.left:
        more = ", ..." if len(upload.left) > _SHOWN else ""
        remarks().print(
            f"{counted(len(upload.left), 'file')} of {folder} that mmi did not write "
            f"{'stays' if len(upload.left) == 1 else 'stay'} here: "
            f"{', '.join(upload.left[:_SHOWN])}{more}"
        )
    if dry_run:
        _print_plan(upload, str(reference), as_json)
        return
    what = upload.kind.called.removeprefix("a ")
    done = upload_to(
        upload,
        reference,
        private=private,
        message=message or f"Upload the {what} {upload.name} with mmi {version('mmi_deploy')}",
        remark=remarks().print,
    )
    if done.others:
        more = ", ..." if len(done.others) > _SHOWN else ""
        remarks().print(
            f"the repository keeps {counted(len(done.others), 'file')} that {folder} does not "
            f"have: {', '.join(done.others[:_SHOWN])}{more}"
        )
    if as_json:
        about = {"repository": str(reference), "commit": done.commit, "url": done.url}
        print_json({**about, "new": done.new, "files": len(upload.files) + 1})
        return
    state = "is at" if done.new else "was there already, at"
    results().print(f"{reference} {state} {done.url}")


def _print_plan(upload: Upload, reference: str, as_json: bool) -> None:
    """Print what would be uploaded: files with their bytes, and the card."""
    files = {name: entry.size for name, entry in sorted(upload.files.items())}
    card = upload.card.decode()
    if as_json:
        about = {"repository": reference, "bytes": upload.bytes, "files": files}
        print_json({**about, "left": upload.left, "own_card": upload.own_card, "card": card})
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    for name, count in files.items():
        table.add_row(name, f"{count:,}")
    source = "the folder's own" if upload.own_card else "written from the manifest"
    table.add_row(f"README.md, {source}", f"{len(upload.card):,}")
    out = results()
    print_table(out, table)
    out.print(f"{len(files) + 1} files, {size(upload.bytes)}, to {reference}. The card:\n")
    out.out(card, end="")
