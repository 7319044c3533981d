"""Entry point of `mmi`; Ctrl-C while the command line is being imported ends it quietly."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from mmi_deploy.cli.app import main as command_line
    except KeyboardInterrupt:
        print("mmi: stopped", file=sys.stderr)
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
