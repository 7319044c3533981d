"""`mmi data emoji`: an emoji set from packages of pictures and keywords."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.output_folder import check_replaceable
from mmi_deploy.system.progress import shown


def emoji(
    icons: Annotated[
        Path,
        typer.Option(
            help="What `npm pack @iconify-json/fluent-emoji-flat` wrote.",
            metavar="FILE.tgz",
            exists=True,
            dir_okay=False,
        ),
    ],
    keywords: Annotated[
        Path,
        typer.Option(
            help="What `npm pack emojilib` wrote.",
            metavar="FILE.tgz",
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the set.", metavar="DIR")],
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="Group of emoji to take (repeatable).",
            show_default="Animals & Nature, Food & Drink",
            metavar="NAME",
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Contact sheet of the set: a new .png file.", dir_okay=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that mmi wrote, of another kind too.")
    ] = False,
) -> None:
    """Draw the emoji of some groups at two sizes, and keep them with names and keywords.

    A tenth of the names, by a hash of each, is held out. Both packages are under the MIT licence.
    """
    check_replaceable(out, force, kind="emoji set", inputs=[icons, keywords])
    if sheet is not None:
        prepare_file(sheet)
    with shown(remarks(), f"making {out}") as progress:
        with extras("data emoji"):
            from mmi_train.data.emoji.documents import EmojiCorpus
            from mmi_train.data.emoji.emoji_set import GROUPS, render, write_set
            from mmi_train.data.emoji.packages import read_icons
        found = read_icons(icons, keywords)
        groups = dict.fromkeys(icon.group for icon in found)
        wanted = group or list(GROUPS)
        for name in wanted:
            if name not in groups:
                raise ConfigError(f"there is no group {name!r}", expected=", ".join(groups))
        chosen = [icon for icon in found if icon.group in wanted]
        made = render(chosen, progress)
        if not made.of("train") or not made.of("held_out"):
            raise ConfigError(f"{len(chosen)} emoji are too few for two splits", fix="add groups")
        write_set(made, out, [icons.name, keywords.name], force)
    if sheet is not None:
        drawn = io.BytesIO()
        EmojiCorpus(made).contact_sheet().save(drawn, "PNG")
        write_new_file(sheet, drawn.getvalue())
    results().print(
        f"{out}: {len(made.of('train'))} emoji to train with, {len(made.of('held_out'))} held out; "
        f"train with `mmi train-tiny --emoji {out}`",
        markup=False,
    )
