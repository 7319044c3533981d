"""`python -m mmi_plugins.check DIR`: the conformance test of `mmi_plugins.conformance.check`."""

from mmi_deploy.cli import program
from mmi_plugins.conformance.check import run

if __name__ == "__main__":
    program.main(run)
