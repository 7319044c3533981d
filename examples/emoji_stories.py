"""Stories of emoji that a model has never seen, as one picture.

python examples/emoji_stories.py BUNDLE DATA -o stories.png

BUNDLE is an exported model of emoji, DATA the emoji set that it was trained on
(docs/training.md). Each row begins with a picture whose name was held out of training; the model
reads it, and after every sentence draws the next picture. All rows are drawn together.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as PillowImage
from PIL import ImageDraw

from mmi_deploy import (
    BatchEngine,
    Document,
    Draw,
    GenerationOptions,
    Image,
    ImageDone,
    MmiError,
    Rgb,
    Text,
    document_of,
)
from mmi_train.data.emoji.documents import EmojiCorpus, Scene
from mmi_train.data.emoji.emoji_set import read_set

NAMES = ("unicorn", "black cat", "hamburger", "baby chick", "cherry blossom")
SENTENCES = (
    "the background turns blue.",
    "the background turns yellow.",
    "it shrinks.",
    "the background turns pink.",
)
SIDE, GAP, HEADING = 128, 6, 42  # px


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="bundle of a model of emoji")
    parser.add_argument("data", type=Path, help="emoji set that the model was trained on")
    parser.add_argument("-o", "--out", type=Path, default=Path("stories.png"))
    parser.add_argument("--names", nargs="+", default=NAMES, help="emoji of the first pictures")
    parser.add_argument("--sentences", nargs="+", default=SENTENCES, help="of every story")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        corpus = EmojiCorpus(read_set(given.data))
        known = {one.name: index for index, one in enumerate(corpus.emoji.emoji)}
        if unknown := set(given.names) - known.keys():
            parser.error(f"the set has no emoji of these names: {', '.join(sorted(unknown))}")
        first = [corpus.picture(Scene(known[name], "large", "white")) for name in given.names]
        options = GenerationOptions(seed=given.seed, guidance=given.guidance, max_images=0)
        with BatchEngine.open(given.bundle) as engine:
            stories = [story(Image(picture), given.sentences) for picture in first]
            streams = [engine.submit(document, options) for document in stories]
            drawn = [[e.rgb for e in stream if isinstance(e, ImageDone)] for stream in streams]
    except MmiError as error:
        raise SystemExit(f"emoji_stories: {error}") from None
    rows = [[picture, *pictures] for picture, pictures in zip(first, drawn, strict=True)]
    sheet(rows, given.sentences).save(given.out)
    print(given.out)


def story(given: Image, sentences: Sequence[str]) -> Document:
    """A picture, then every sentence with a place to draw after it."""
    return document_of(given, *(part for text in sentences for part in (Text(text), Draw())))


def sheet(rows: Sequence[Sequence[Rgb]], sentences: Sequence[str]) -> PillowImage.Image:
    """One row per story; the sentences stand above the pictures that follow them."""
    columns = 1 + len(sentences)
    size = columns * (SIDE + GAP) + GAP, HEADING + len(rows) * (SIDE + GAP)
    made = PillowImage.new("RGB", size, "white")
    pen = ImageDraw.Draw(made)
    for column, text in enumerate(("given", *sentences)):
        wrapped = "\n".join(textwrap.wrap(text, 18)[-2:])
        place = GAP + column * (SIDE + GAP), HEADING - 4
        pen.multiline_text(place, wrapped, fill="black", font_size=14, anchor="ld")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            large = PillowImage.fromarray(picture).resize(
                (SIDE, SIDE), PillowImage.Resampling.BICUBIC
            )
            made.paste(large, (GAP + column * (SIDE + GAP), HEADING + row * (SIDE + GAP)))
    return made


if __name__ == "__main__":
    main()
