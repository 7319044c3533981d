"""Bundle, engines and machine that a command runs on, as its options choose them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli.console import remarks
from mmi_deploy.cli.target_options import say_memory
from mmi_deploy.runtime.backend import find_kernel_library
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import NONE


@dataclass(frozen=True)
class Machine:
    """Options as in the help of `mmi generate`. slots: documents at once, None for as many as the
    memory holds. given: the bundle as the user wrote it, where that is not its path."""

    bundle: Path
    target: str
    kernels: str
    threads: int
    device: int
    resident: tuple[str, ...] | None
    slots: int | None
    unproved: bool
    given: str | None = None

    @property
    def called(self) -> str:
        """The bundle as a command line names it."""
        return self.given or str(self.bundle)

    def open_bundle(self) -> Bundle:
        """Open the bundle and print its remarks. Raises `BundleError`."""
        opened = Bundle.open(self.bundle, unproved=self.unproved)
        for remark in opened.remarks:
            remarks().print(remark)
        return opened

    def find_kernels(self) -> str | Path:
        """Library of the MMFS kernels, compiled the first time, or `none`."""
        return find_kernel_library(self.target, self.kernels) or NONE

    def open_runtime(self, bundle: Bundle, kernels: str | Path, beams: int = 1) -> Runtime:
        """Open the runtime, which loads no engine yet, and print the memory of a GPU with a
        document of `beams`. Raises `MmiError`."""
        runtime = Runtime.open(
            bundle,
            threads=self.threads,
            target=self.target,
            kernels=kernels,
            device=self.device,
            resident=self.resident,
            beams=beams,
        )
        say_memory(runtime, self.target, beams)
        return runtime

    def record(self, bundle: Bundle, options: GenerationOptions) -> dict[str, Any]:
        """Everything that results depend on besides the documents, for JSON."""
        # Of the engines alone: receipts are written later.
        built = bundle.target(self.target, unproved=True) if self.target in bundle.targets else None
        settings = asdict(options)
        del settings["previews"]  # not in the results
        if options.beams == 1:  # as runs of earlier versions, which are continued
            for name in ("beams", "length_penalty", "early_stopping"):
                del settings[name]
        return {
            "bundle": bundle.identity,
            "target": self.target,
            "engines": None if built is None else built.engines,
            **settings,
        }
