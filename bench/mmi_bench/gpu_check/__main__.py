"""`python -m mmi_bench.gpu_check BUNDLE`, which `make gpu-check` runs."""

from mmi_bench.gpu_check.check import run
from mmi_deploy.cli import program

program.main(run)
