"""VQA accuracy: an answer counts as much as people gave it, after the official normalisation.

Source: Antol et al., "VQA: Visual Question Answering" (2015), and the evaluation code of the VQA
and VizWiz challenges. Where that code departs from its own rules, a flag reproduces it; the
defaults follow the rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

# Matching answers of other people from which an answer is fully right.
ENOUGH = 3

Apostrophe = Literal["'", "’"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")

# Full stops that the official code removes at most: a flag of `re` is given as the count.
MOST_FULL_STOPS = int(re.UNICODE)

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = {"a", "an", "the"}

# Contractions that are restored when one apostrophe is missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd've he'd he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
""".split()


def _restored() -> dict[str, str]:
    """Contraction without one of its apostrophes -> contraction."""
    restored = {
        whole[:place] + whole[place + 1 :]: whole
        for whole in _CONTRACTIONS
        for place, letter in enumerate(whole)
        if letter == "'"
    }
    return restored | {"somebody'd": "somebodyd"}  # as the official table has it


_RESTORED = _restored()

# VizWiz's table has curly apostrophes, except in these.
_STRAIGHT_KEYS = {"couldn'tve", "hadn'tve"}
_STRAIGHT_VALUES = {
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "we've",
    "where's",
    "who've",
}
_CURLED = {
    key if key in _STRAIGHT_KEYS else key.replace("'", "’"): (
        value if value in _STRAIGHT_VALUES else value.replace("'", "’")
    )
    for key, value in _RESTORED.items()
}


def without_punctuation(text: str, *, most_full_stops: int = 0) -> str:
    """Remove punctuation, or replace it by a blank where it joins two words.

    Commas vanish in a text with a number such as 1,000, as all punctuation does there. Full stops
    before a digit stay. most_full_stops: bound of those that are removed; 0: all.
    """
    joined = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if apart or joined else " ")
    return _FULL_STOP.sub("", result, count=most_full_stops)


def plain_words(text: str, *, apostrophe: Apostrophe = "'") -> str:
    """Lower-case words of `text`: numbers to ten as digits, no articles, contractions restored.

    apostrophe: ’ reproduces the table of VizWiz's code.
    """
    table = _RESTORED if apostrophe == "'" else _CURLED
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(table.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=1 << 16)
def normalised(answer: str, *, few_full_stops: bool = False, apostrophe: Apostrophe = "'") -> str:
    """Normalise an answer. few_full_stops: remove at most 32, as the official code does."""
    bound = MOST_FULL_STOPS if few_full_stops else 0
    return plain_words(
        without_punctuation(one_line(answer), most_full_stops=bound), apostrophe=apostrophe
    )


def one_line(answer: str) -> str:
    """`answer` without line breaks, tabs and blanks around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accuracy(
    prediction: str,
    answers: Sequence[str],
    *,
    raw_when_unanimous: bool = False,
    few_full_stops: bool = False,
    equal_answers_together: bool = False,
    raw_answers: bool = False,
    apostrophe: Apostrophe = "'",
) -> float:
    """VQA accuracy of a prediction, 0 to 1: the mean over people, each left out in turn, of
    min(1, matches among the others / 3).

    Flags of the published code. raw_when_unanimous: nothing is normalised when all answers are
    equal. few_full_stops: as in `normalised`. equal_answers_together: a person's answer is left
    out with all that equal it, as happens to answers without `answer_id`. VizWiz: raw_answers,
    people's answers stay as they are; apostrophe, as in `plain_words`.
    """
    if not answers:
        raise ValueError("VQA accuracy needs an answer to compare with")

    def plain(text: str) -> str:
        return normalised(text, few_full_stops=few_full_stops, apostrophe=apostrophe)

    if raw_answers:
        given, predicted = list(answers), plain(prediction)
    elif raw_when_unanimous and len({one_line(answer) for answer in answers}) == 1:
        given, predicted = [one_line(answer) for answer in answers], one_line(prediction)
    else:
        given, predicted = [plain(answer) for answer in answers], plain(prediction)
    matches = given.count(predicted)
    total = 0.0
    for answer in given:
        left_out = given.count(answer) if equal_answers_together else 1
        others = matches - left_out if answer == predicted else matches
        total += min(1.0, others / ENOUGH)
    return total / len(given)


def extract_answer(response: str) -> str:
    """Short answer within a sentence, by the published rule, which also cuts inside words: `pizza
    on` becomes `pizz`."""
    text = response.replace('"', "").strip()
    for end in "\n.,!":
        text = text.split(end)[0]
    text = text.lower()
    for opening in ("is ", "are ", "a ", "an ", "the "):
        if opening in text:
            text = text.split(opening)[1]
    for end in (" of", " or ", " and "):
        text = text.split(end)[0]
    return text.strip()
