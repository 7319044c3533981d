"""Tokens of captions, and METEOR: Java programs of the package pycocoevalcap, as MS-COCO's
evaluation runs them.

Without Java or the package a tokenizer in Python follows the same rules on texts such as captions;
scores from its tokens have a name of their own.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from mmi_deploy.errors import MmiError
from mmi_train.evaluation.metrics import ptb_tokens

# Archives in the package pycocoevalcap.
TOKENIZER, METEOR = "tokenizer/stanford-corenlp-3.4.1.jar", "meteor/meteor-1.5.jar"

# Tokens that do not count. The official list is compared after lower-casing, so that its brackets
# (-LRB-) never leave and only these runs of punctuation do.
_OFFICIAL = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = frozenset(["-lrb-", "-rrb-", "-lcb-", "-rcb-", "-lsb-", "-rsb-"])

Tokenize = Callable[[Sequence[str]], list[str]]


def tokenizer(*, brackets_stay: bool = False) -> tuple[Tokenize, str]:
    """The best tokenizer that is there, and what its scores' names say: nothing for Java's.

    It turns texts into lower-case tokens joined by blanks, without punctuation. brackets_stay: as
    the official code does, keep brackets (-lrb-) and runs such as !!!.
    """
    archive = java_archive(TOKENIZER)
    lines, said = (
        (ptb_tokens.token_lines, "python tokens") if archive is None else (_java(archive), "")
    )

    def tokenize(texts: Sequence[str]) -> list[str]:
        return [
            without_punctuation(line, brackets_stay=brackets_stay)
            for line in lines([" ".join(text.split()) for text in texts])
        ]

    return tokenize, said


def java_archive(name: str) -> Path | None:
    """One of the Java archives; None without Java or pycocoevalcap."""
    found = find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations or shutil.which("java") is None:
        return None
    archive = Path(found.submodule_search_locations[0]) / name
    return archive if archive.is_file() else None


def without_punctuation(line: str, *, brackets_stay: bool = False) -> str:
    """Tokens of a line without those that are punctuation. brackets_stay: as in `tokenizer`."""
    words = [word for word in line.split(" ") if word not in _OFFICIAL]
    if not brackets_stay:
        words = [word for word in words if word not in _BRACKETS and not _is_run(word)]
    return " ".join(words)


def _is_run(word: str) -> bool:
    return len(word) > 1 and not word.strip("!?.,:;-")


def _java(archive: Path) -> Tokenize:
    def lines(texts: Sequence[str]) -> list[str]:
        options = ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
        command = ["java", "-cp", str(archive), "edu.stanford.nlp.process.PTBTokenizer", *options]
        # Without a last line break the program takes a contraction at the end apart in another way.
        found = _answer(command, "\n".join(texts) + "\n").split("\n")[: len(texts)]
        return [line.rstrip() for line in found + [""] * (len(texts) - len(found))]

    return lines


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of all captions, 0 to 1, in tokens. Raises `MmiError` without Java."""
    archive = java_archive(METEOR)
    if archive is None:
        raise MmiError(
            "METEOR needs Java and pycocoevalcap",
            fix="install a Java runtime, and: pip install 'mmi_deploy[evaluate]'",
        )
    captions = [text.replace("|||", "").replace("  ", " ") for text in candidates]
    lines = [
        " ||| ".join(["SCORE", *(text.replace("|||", "") for text in others), own])
        for own, others in zip(captions, references, strict=True)
    ]
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]
    # One process, since it loads its tables for seconds: a line of statistics for each caption,
    # then the score of all of them, which it gives after a score for each.
    with subprocess.Popen(
        ["java", "-Xmx2G", "-jar", str(archive), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            statistics = []
            for line in lines:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
                statistics.append(process.stdout.readline().strip())
            process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
            process.stdin.flush()
            scores = [process.stdout.readline() for _ in range(len(lines) + 1)]
            process.stdin.close()
            return float(scores[-1])
        except (OSError, ValueError):
            raise MmiError("METEOR's Java program ended too early") from None


def _answer(command: Sequence[str], question: str) -> str:
    """Output of a Java program. Raises `MmiError` if it fails."""
    run = subprocess.run(command, input=question.encode(), capture_output=True, check=False)
    if run.returncode:
        said = run.stderr.decode(errors="replace").strip().splitlines()
        raise MmiError(
            "a Java program of pycocoevalcap failed",
            got=said[-1] if said else f"code {run.returncode}",
        )
    return run.stdout.decode()
