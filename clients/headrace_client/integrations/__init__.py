"""Adapters for trainers and data loaders. All need torch: an error here names its extra before their own imports."""

from headrace_client.extras import needing

with needing("headrace[torch]"):
    import torch  # noqa: F401
