"""Usage: tokens of a request and of its reply, visual tokens included.

A picture counts its begin-of-image token and its visual tokens, wherever it stands: among the
prompt's if it was given, among the reply's if it was drawn, also where the document asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmi_deploy.documents.document import EncodedDocument
from mmi_deploy.spec.config import ModelConfig


def picture_tokens(config: ModelConfig) -> int:
    """Tokens of one picture."""
    return 1 + config.visual_tokens


@dataclass(frozen=True)
class PromptUsage:
    """Tokens of a request. text: with `<s>`. image: of the given pictures."""

    text: int
    image: int

    @classmethod
    def of(cls, encoded: EncodedDocument, config: ModelConfig) -> PromptUsage:
        """Count the tokens of an encoded document."""
        each, given = picture_tokens(config), sum(one is not None for one in encoded.images)
        text = len(encoded.token_ids) - each * len(encoded.images)
        return cls(text, each * given)

    @property
    def total(self) -> int:
        """All tokens."""
        return self.text + self.image


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and of its reply so far. cached: tokens of the prompt that the engine
    did not have to compute. text: written. image: of drawn pictures."""

    prompt: PromptUsage
    text: int = 0
    image: int = 0
    cached: int = 0

    @property
    def completion(self) -> int:
        """Tokens of the reply."""
        return self.text + self.image

    @property
    def total(self) -> int:
        """Tokens of request and reply."""
        return self.prompt.total + self.completion

    def chat(self) -> dict[str, Any]:
        """`usage` of chat and completions."""
        return {
            "prompt_tokens": self.prompt.total,
            "completion_tokens": self.completion,
            "total_tokens": self.total,
            "prompt_tokens_details": {
                "cached_tokens": self.cached,
                "text_tokens": self.prompt.text,
                "image_tokens": self.prompt.image,
            },
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "text_tokens": self.text,
                "image_tokens": self.image,
            },
        }

    def responses(self) -> dict[str, Any]:
        """`usage` of Responses."""
        return {
            "input_tokens": self.prompt.total,
            "input_tokens_details": {
                "cached_tokens": self.cached,
                "cache_write_tokens": 0,
                "text_tokens": self.prompt.text,
                "image_tokens": self.prompt.image,
            },
            "output_tokens": self.completion,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "text_tokens": self.text,
                "image_tokens": self.image,
            },
            "total_tokens": self.total,
        }

    def images(self) -> dict[str, Any]:
        """`usage` of Images."""
        return {
            "input_tokens": self.prompt.total,
            "input_tokens_details": {
                "text_tokens": self.prompt.text,
                "image_tokens": self.prompt.image,
            },
            "output_tokens": self.completion,
            "output_tokens_details": {"text_tokens": self.text, "image_tokens": self.image},
            "total_tokens": self.total,
        }
