"""Stories of emoji that a model has never seen, as one picture.

python examples/emoji_stories.py BUNDLE DATA -o stories.png

BUNDLE is an exported model of emoji, DATA the emoji set that it was trained on
(docs/training.md). Each row begins with a picture whose name was held out of training; the model
reads it, and after every sentence draws the next picture. All rows are drawn together.
"""

from __future__ import annotations

import argparse
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
    Text,
    document_of,
)
from mmi_train.data.emoji.documents import EmojiCorpus, Scene
from mmi_train.data.emoji.emoji_set import read_set

NAMES = ("unicorn", "turtle", "hamburger", "fish", "rose", "bear")
SENTENCES = (
    "the background turns blue.",
    "the background turns yellow.",
    "it shrinks.",
    "the background turns pink.",
)
SIDE, GAP, HEADING = 128, 6, 26  # px


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="bundle of a model of emoji")
    parser.add_argument("data", type=Path, help="emoji set that the model was trained on")
    parser.add_argument("-o", "--out", type=Path, default=Path("stories.png"))
    parser.add_argument("--names", nargs="+", default=NAMES, help="emoji of the first pictures")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    corpus = EmojiCorpus(read_set(arguments.data))
    known = {one.name: index for index, one in enumerate(corpus.emoji.emoji)}
    if unknown := set(arguments.names) - known.keys():
        parser.error(f"the set has no emoji of these names: {', '.join(sorted(unknown))}")
    first = [corpus.picture(Scene(known[name], "large", "white")) for name in arguments.names]
    options = GenerationOptions(
        seed=arguments.seed, guidance=arguments.guidance, max_images=0, max_tokens=1
    )
    with BatchEngine.open(arguments.bundle) as engine:
        streams = [engine.submit(story(Image(picture)), options) for picture in first]
        drawn = [[e.rgb for e in stream if isinstance(e, ImageDone)] for stream in streams]
    rows = [[given, *pictures] for given, pictures in zip(first, drawn, strict=True)]
    sheet(rows).save(arguments.out)
    print(arguments.out)


def story(given: Image) -> Document:
    """A picture, then every sentence with a place to draw after it."""
    return document_of(given, *(part for text in SENTENCES for part in (Text(text), Draw())))


def sheet(rows: list[list]) -> PillowImage.Image:
    """One row per story; the sentences stand above the pictures that follow them."""
    columns = 1 + len(SENTENCES)
    size = columns * (SIDE + GAP) + GAP, HEADING + len(rows) * (SIDE + GAP)
    made = PillowImage.new("RGB", size, "white")
    pen = ImageDraw.Draw(made)
    for column, text in enumerate(("given", *SENTENCES)):
        pen.text((GAP + column * (SIDE + GAP), 8), text.removeprefix("the "), fill="black")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            large = PillowImage.fromarray(picture).resize(
                (SIDE, SIDE), PillowImage.Resampling.BICUBIC
            )
            made.paste(large, (GAP + column * (SIDE + GAP), HEADING + row * (SIDE + GAP)))
    return made


if __name__ == "__main__":
    main()
