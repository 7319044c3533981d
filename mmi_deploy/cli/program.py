"""Run a command line: results on stdout, errors as one line on stderr, and an exit code.

Exit codes: 0 success; 2 an error that the user can fix; 130 stopped by Ctrl-C; 143 stopped by
SIGTERM. Unexpected errors (bugs) are raised.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

import typer
from typer.exceptions import TyperException

from mmi_deploy.errors import MmiError
from mmi_deploy.system.memory import is_out_of_memory, out_of_memory

STOPPED = 128 + signal.SIGINT

# Most characters of an error's line.
_LONGEST = 4000

# Signals received, which stop the command.
_signals: list[int] = []


def program(name: str, command: Callable[..., int]) -> Callable[[Sequence[str]], int]:
    """Make a `run` function for a program with a single command, which returns its exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=help_of(command))(command)
    return partial(run, app, name)


def help_of(command: Callable[..., object]) -> str:
    """Help text of a command: its docstring with one line per paragraph.

    The terminal wraps lines, and would keep the line breaks of the source as well.
    """
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def run(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run one command line of the program called `name` and return its exit code. Raises unexpected
    errors."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller, as in `mmi ... >&-`
            setattr(sys, stream, open(os.devnull, "w"))
    try:
        code = app(list(arguments), prog_name=name, standalone_mode=False)
        code = code if isinstance(code, int) else 0
        return _stopped() if code == STOPPED else code
    except TyperException as error:
        line = " ".join(error.format_message().split()).rstrip(".")
        if not line:
            return 2  # typer has printed the help
        context = getattr(error, "ctx", None)
        return say(f"{line}. See `{context.command_path if context else name} --help`", 2)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return _stopped() if code == STOPPED else code
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `mmi ... | head` is fine
        return 0
    except MmiError as error:
        return say(str(error), error.exit_code)
    except Exception as error:
        if _signals:  # a library converted KeyboardInterrupt, as imports do
            return _stopped()
        if "--debug" in arguments:
            raise
        if disk_is_full(error):
            return say("the disk is full. Free some space and run the command again", 2)
        if is_out_of_memory(error):
            return say(str(out_of_memory("for this command")), 2)
        if isinstance(error, OSError) and error.filename:
            return say(f"{error.filename}: {error.strerror}", 2)
        raise


def say(text: str, code: int) -> int:
    """Print one line on stderr and return `code`."""
    print(f"mmi: {one_line(text)}", file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, which names in a file of somebody else
    may hold, cut off after `_LONGEST` characters."""
    line = re.sub(r"[\n\r\t\v\f]+ *", " ", text)
    shown = line if len(line) <= _LONGEST else f"{line[:_LONGEST]} and {len(line) - _LONGEST} more"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def main(run: Callable[[list[str]], int]) -> None:
    """Run the program and exit. SIGTERM is handled like Ctrl-C, so temporary files are removed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for encodings that lack a character
    sys.exit(run(sys.argv[1:]))


def disk_is_full(error: Exception) -> bool:
    """Return True for a full disk or quota; some libraries name it in the error's text only."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    known = isinstance(error, OSError) and error.errno in full
    return known or any(os.strerror(number) in str(error) for number in full)


def _stopped() -> int:
    return say("stopped", 128 + _signals[0] if _signals else STOPPED)


def _stop(number: int, _: object) -> None:
    _signals.append(number)
    raise KeyboardInterrupt
