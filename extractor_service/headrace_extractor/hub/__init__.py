"""Datasets of the Hugging Face hub, streamed.

`client` starts a process of its own for each dataset and reads documents from it; `reading`, in that process, alone
imports `datasets` and `huggingface_hub`, which are optional here. `job` is what the two say to one another.
"""
