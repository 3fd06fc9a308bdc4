"""Text, layer and batch sizes of the benchmarks with SmolLM2. Imports the standard library alone."""

from __future__ import annotations

import pydoc_data.topics
import re

LAYER = 14
CONTEXT_SIZE = 256
BATCH_SIZE = 4  # sequences of CONTEXT_SIZE tokens: one packed batch
PLAIN_BATCH_SIZE = 32  # paragraphs


def paragraphs() -> list[str]:
    """Returns the paragraphs of the standard library's documentation: 460 KB of English."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
