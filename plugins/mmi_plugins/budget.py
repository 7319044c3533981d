"""Name the program that `python -m mmi_plugins.budget` is now."""

import sys

if __name__ == "__main__":
    sys.exit(
        "mmi: this program is `python -m mmi_emulator.ptx_budget` now, in the source tree alone"
    )
