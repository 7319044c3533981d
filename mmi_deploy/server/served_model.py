"""The bundle as the front process knows it: limits, tokenizer and names; no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits


@dataclass(frozen=True)
class ServedModel:
    """A model that is served.

    name: in requests and replies. steps: denoising steps of each sampler, the default first.
    fingerprint: of bundle, target, version and kernels: equal fingerprints give equal answers.
    created: Unix time. previews: if its bundle has the map that shows pictures out of the noise.
    """

    name: str
    config: ModelConfig
    limits: Limits
    tokenizer: Tokenizer
    steps: Mapping[str, int]
    fingerprint: str
    created: int
    target: str
    previews: bool = True

    @classmethod
    def of(cls, bundle: Bundle, name: str, target: str, fingerprint: str) -> ServedModel:
        """Read what replies need of an opened bundle."""
        manifest = bundle.folder / "bundle.json"
        return cls(
            name,
            bundle.config,
            bundle.limits,
            Tokenizer.open(bundle.tokenizer, bundle.config.tokens),
            {key: bundle.schedule(key).steps for key in bundle.schedules},
            fingerprint,
            int(manifest.stat().st_mtime),
            target,
            bundle.manifest.preview is not None,
        )

    @property
    def given_side(self) -> int:
        """Side in pixels to which a given picture is scaled."""
        return self.config.vision.image_size

    @property
    def drawn_side(self) -> int:
        """Side in pixels of a drawn picture."""
        return self.config.image_decoder.image_size
