"""The tiny model's word vocabulary, as a Hugging Face `tokenizers` tokenizer.

One vocabulary serves every difficulty, so a model trained on one can go on with the next.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from mmi_train.data.synthetic.tasks import BOX_PIXELS, NUMBER_WORDS
from mmi_train.data.synthetic.world import BACKGROUNDS, COLOURS, DIRECTIONS, IMAGE_SIDE, SHAPES

PAD, BEGIN, END, BEGIN_OF_IMAGE, IMAGE, UNKNOWN = range(6)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|beginofimage|>", "<|image|>", "<unk>")

_PUNCTUATION = (".", ",", ":", "?")
_PLACE_WORDS = ("top", "middle", "bottom", "left", "center", "right")
_PHRASES = (
    "caption how many shapes what is the background where at colour shape size which digit find "
    "draw paint a and on small large moves turns grows shrinks vanishes appears"
)


def words() -> tuple[str, ...]:
    """All tokens in the order of their ids."""
    boxes = [f"<{step}>" for step in range(IMAGE_SIDE // BOX_PIXELS + 1)]
    digits = [str(digit) for digit in range(10)]
    groups = (
        SPECIAL_TOKENS,
        _PUNCTUATION,
        _PHRASES.split(),
        SHAPES,
        COLOURS,
        BACKGROUNDS,
        _PLACE_WORDS,
        DIRECTIONS,
        NUMBER_WORDS,
        digits,
        boxes,
    )
    return tuple(dict.fromkeys(word for group in groups for word in group))


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer: lower case, one token a word, punctuation mark or `<n>` of a box.

    `encode` adds no special tokens; `decode` leaves them out and restores natural spacing.
    """
    vocabulary = {word: index for index, word in enumerate(words())}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[UNKNOWN]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Lowercase()
    token = Regex(r"<\d+>|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(token, "isolated")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")]
    )
    return tokenizer
