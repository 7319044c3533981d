"""Documents about emoji: reading, drawing by name or keywords, and stories of changes.

A picture shows one emoji in one of two sizes on a background of one of six colours, and may be
mirrored, which only a story says. In a story a sentence changes one of these, or names the next
emoji; all but the new emoji is seen in the picture before it alone. Every text ends in a full stop,
which ends decoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from mmi_train.data.corpus import Split
from mmi_train.data.document import ImagePart, TextPart
from mmi_train.data.emoji.emoji_set import WIDTHS, EmojiSet
from mmi_train.data.synthetic.vocabulary import SPECIAL_TOKENS, UNKNOWN

SIDE = 64  # px
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "white": (255, 255, 255),
        "pink": (255, 200, 215),
        "blue": (180, 215, 255),
        "green": (195, 235, 190),
        "yellow": (255, 240, 175),
        "gray": (90, 95, 105),
    }
)
PROMPTED_KEYWORDS = 3  # of a drawing that is asked for by keywords
BY_KEYWORDS = 0.2  # share of drawings that are
_WORD = r"[^\s.:?]+|[.:?]"  # of a text, as the tokenizer splits it
WORDS = (
    "caption draw small on what is it which group size background the turns flips grows shrinks "
    "next"
)


@dataclass(frozen=True)
class Scene:
    """One picture: emoji number `index` of a set."""

    index: int
    size: str
    background: str
    mirrored: bool = False


@dataclass(frozen=True)
class EmojiImage(ImagePart):
    """A picture, and what it shows."""

    scene: Scene


@dataclass(frozen=True)
class EmojiDocument:
    """A document about emoji. `targets`: indices of the answers and drawn pictures."""

    kind: str
    parts: tuple[TextPart | EmojiImage, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class EmojiCorpus:
    """Documents about the emoji of a set; held-out ones are about its held-out names."""

    emoji: EmojiSet

    @property
    def mixture(self) -> Mapping[str, int]:
        return MappingProxyType({"reading": 8, "drawing": 12, "story": 6})

    @property
    def conditioning_mixture(self) -> Mapping[str, int]:
        return MappingProxyType({"reading": 12, "drawing": 24, "story": 10})

    @property
    def picture_mixture(self) -> Mapping[str, int]:
        return MappingProxyType({"drawing": 10, "story": 6})

    def document(
        self, kind: str, rng: np.random.Generator, split: Split = "train"
    ) -> EmojiDocument:
        makers: dict[str, Callable[[np.random.Generator, Split], EmojiDocument]] = {
            "reading": self._reading,
            "caption": self._caption,
            "question": self._question,
            "drawing": self._drawing,
            "keywords": self._keywords,
            "story": self._story,
        }
        return makers[kind](rng, split)

    def pictures(self, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        return [self.picture(self._scene(rng, "train", mirror=True)) for _ in range(count)]

    def tokenizer(self) -> Tokenizer:
        """One token a word: those of the prompts, then those of names, groups and keywords."""
        used: list[str] = [".", ":", "?", *WORDS.split(), *WIDTHS, *BACKGROUNDS]
        for one in self.emoji.emoji:
            text = " ".join([one.name, group_text(one.group), *one.keywords])
            used += re.findall(_WORD, text.lower())
        words = [*SPECIAL_TOKENS, *sorted(dict.fromkeys(used))]
        tokenizer = Tokenizer(
            WordLevel({word: id for id, word in enumerate(words)}, SPECIAL_TOKENS[UNKNOWN])
        )
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        tokenizer.normalizer = normalizers.Lowercase()
        split = pre_tokenizers.Split(Regex(_WORD), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
        tokenizer.decoder = decoders.Sequence(
            [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")]
        )
        return tokenizer

    def describe(self) -> object:
        return {"emoji": self.emoji.checksum, "count": len(self.emoji.emoji)}

    # ---- pictures and texts ---------------------------------------------------------------------

    def picture(self, scene: Scene) -> np.ndarray:
        """Draw a scene, uint8 [64, 64, 3]."""
        drawn = self.emoji.pictures[scene.size][scene.index]
        if scene.mirrored:
            drawn = drawn[:, ::-1]
        picture = np.empty((SIDE, SIDE, 3), np.float32)
        picture[:] = BACKGROUNDS[scene.background]
        edge = (SIDE - drawn.shape[0]) // 2
        window = picture[edge : edge + drawn.shape[0], edge : edge + drawn.shape[1]]
        opacity = drawn[..., 3:].astype(np.float32) / 255
        window += opacity * (drawn[..., :3] - window)
        return np.asarray((picture + 0.5).astype(np.uint8))

    def contact_sheet(self, columns: int = 24) -> Image.Image:
        """All emoji in the order of the set, those of the held-out split on yellow."""
        rows = -(-len(self.emoji.emoji) // columns)
        sheet = Image.new("RGB", (columns * SIDE, rows * SIDE), BACKGROUNDS["white"])
        for index, one in enumerate(self.emoji.emoji):
            background = "yellow" if one.split == "held_out" else "white"
            drawn = Image.fromarray(self.picture(Scene(index, "large", background)))
            sheet.paste(drawn, (index % columns * SIDE, index // columns * SIDE))
        return sheet

    def phrase(self, scene: Scene) -> str:
        """The caption without its full stop: "small cat face on pink"."""
        small = "small " if scene.size == "small" else ""
        return f"{small}{self.emoji.emoji[scene.index].name} on {scene.background}"

    def questions(self, scene: Scene) -> list[tuple[str, str]]:
        """All questions about a picture with their answers."""
        one = self.emoji.emoji[scene.index]
        return [
            ("what is it?", f"{one.name}."),
            ("which group?", f"{group_text(one.group)}."),
            ("what size?", f"{scene.size}."),
            ("what is the background?", f"{scene.background}."),
        ]

    # ---- documents ------------------------------------------------------------------------------

    @cached_property
    def _of(self) -> dict[Split, list[int]]:
        return {split: self.emoji.of(split) for split in ("train", "held_out")}

    def _scene(
        self, rng: np.random.Generator, split: Split, mirror: bool = False, index: int | None = None
    ) -> Scene:
        options = self._of[split]
        index = options[int(rng.integers(len(options)))] if index is None else index
        size, background = _pick(rng, WIDTHS), _pick(rng, BACKGROUNDS)
        return Scene(index, size, background, mirror and bool(rng.integers(2)))

    def _image(self, scene: Scene, draw: bool) -> EmojiImage:
        return EmojiImage(self.picture(scene), draw, scene)

    def _about(self, kind: str, scene: Scene, turns: list[tuple[str, str]]) -> EmojiDocument:
        texts = [TextPart(text, bool(index)) for turn in turns for index, text in enumerate(turn)]
        parts: tuple[TextPart | EmojiImage, ...] = (self._image(scene, False), *texts)
        return EmojiDocument(kind, parts, tuple(range(2, len(parts), 2)))

    def _reading(self, rng: np.random.Generator, split: Split) -> EmojiDocument:
        """A picture with two questions and its caption, in random order."""
        scene = self._scene(rng, split, mirror=True)
        turns = [("caption:", f"{self.phrase(scene)}."), *self.questions(scene)]
        chosen = rng.permutation(len(turns))[:3].tolist()
        return self._about("reading", scene, [turns[index] for index in chosen])

    def _caption(self, rng: np.random.Generator, split: Split) -> EmojiDocument:
        scene = self._scene(rng, split)
        return self._about("caption", scene, [("caption:", f"{self.phrase(scene)}.")])

    def _question(self, rng: np.random.Generator, split: Split) -> EmojiDocument:
        scene = self._scene(rng, split)
        options = self.questions(scene)
        return self._about("question", scene, [options[int(rng.integers(len(options)))]])

    def _drawing(self, rng: np.random.Generator, split: Split) -> EmojiDocument:
        """A caption, or keywords, and the picture to be drawn."""
        if rng.random() < BY_KEYWORDS:
            return replace(self._keywords(rng, split), kind="drawing")
        scene = self._scene(rng, split)
        return self._drawn("drawing", self.phrase(scene), scene)

    def _keywords(self, rng: np.random.Generator, split: Split) -> EmojiDocument:
        """Some of an emoji's keywords, without its name, and its picture."""
        scene = self._scene(rng, split)
        one = self.emoji.emoji[scene.index]
        words = [word for word in one.keywords if word != one.name] or [one.name]
        chosen = [words[i] for i in rng.permutation(len(words))[:PROMPTED_KEYWORDS].tolist()]
        small = "small " if scene.size == "small" else ""
        return self._drawn("keywords", f"{small}{' '.join(chosen)} on {scene.background}", scene)

    def _drawn(self, kind: str, phrase: str, scene: Scene) -> EmojiDocument:
        parts = (TextPart(f"draw: {phrase}.", False), self._image(scene, True))
        return EmojiDocument(kind, parts, (1,))

    def _story(
        self, rng: np.random.Generator, split: Split, pictures: int | None = None
    ) -> EmojiDocument:
        """A picture, then sentences with the picture that each makes of it; `pictures` counts the
        first one too, by default two to four."""
        scene = self._scene(rng, split, mirror=True)
        parts: list[TextPart | EmojiImage] = [self._image(scene, False)]
        for _ in range((pictures or int(rng.integers(2, 5))) - 1):
            sentence, scene = self._change(rng, scene, split)
            parts += [TextPart(sentence, True), self._image(scene, True)]
        return EmojiDocument("story", tuple(parts), tuple(range(2, len(parts), 2)))

    def _change(self, rng: np.random.Generator, scene: Scene, split: Split) -> tuple[str, Scene]:
        """Sentence of a change, and the scene after it."""
        verb = _pick(rng, ("turns", "turns", "flips", "size", "next"))
        if verb == "turns":
            background = _pick(rng, [name for name in BACKGROUNDS if name != scene.background])
            return f"the background turns {background}.", replace(scene, background=background)
        if verb == "flips":
            return "it flips.", replace(scene, mirrored=not scene.mirrored)
        if verb == "size":
            if scene.size == "large":
                return "it shrinks.", replace(scene, size="small")
            return "it grows.", replace(scene, size="large")
        following = self._scene(rng, split)
        return f"next: {self.phrase(following)}.", following


def group_text(group: str) -> str:
    """A group in words: "animals and nature"."""
    return group.lower().replace("&", "and")


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    choices = list(options)
    return choices[int(rng.integers(len(choices)))]
