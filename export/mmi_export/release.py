"""`python -m mmi_export.release`: archive a bundle with example documents; write checksums.

The archive is reproducible: the same files give the same bytes. Engines are left out, as they
run on the machine that built them.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.cli import program
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import write_file

# File name of the checksums that `sha256sum --check` reads.
SUMS = "SHA256SUMS"


def archive(out: Path, folders: dict[str, Path]) -> None:
    """Write the files of `folders`, each under its name, to the .tar.gz `out`."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, folder in folders.items():
            for path in _files(folder):
                member = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
                member.size, member.mode = path.stat().st_size, 0o644
                with path.open("rb") as file:
                    tar.addfile(member, file)
    write_file(out, packed.getvalue())


def _files(folder: Path) -> Iterator[Path]:
    """Files of a bundle or of a folder of documents, sorted by name.

    Engines and hidden files belong to one machine and are left out.
    """
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] != "engines" and not any(p.startswith(".") for p in parts):
            yield path


def write_sums(folder: Path, files: Iterable[Path]) -> Path:
    """Write SHA256SUMS of `files`, which lie in `folder`; return its path."""
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(files)]
    path = folder / SUMS
    write_file(path, "".join(lines))
    return path


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `mmi export` wrote.")] = Path(
        "bundles/tiny"
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that holds the wheel.")] = Path(
        "dist"
    ),
    examples: Annotated[
        Path, typer.Option(help="Example documents to archive with the bundle.")
    ] = Path("examples"),
) -> int:
    """Archive a bundle with example documents beside its wheel, and write checksums of both."""
    wheels = sorted(out.glob("mmi_deploy-*.whl"))
    if len(wheels) != 1:
        raise ConfigError(
            f"{out} does not hold one wheel",
            expected="one mmi_deploy-*.whl",
            got=", ".join(path.name for path in wheels) or "none",
            fix="empty the folder and run `make release`",
        )
    opened = Bundle.open(bundle)
    opened.verify()
    version = wheels[0].name.split("-")[1]
    made = out / f"mmi_{bundle.name}_bundle-{version}.tar.gz"
    archive(made, {bundle.name: bundle, "examples": examples})
    sums = write_sums(out, [wheels[0], made])
    for path in (wheels[0], made, sums):
        typer.echo(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    program.main(program.program("python -m mmi_export.release", main))
