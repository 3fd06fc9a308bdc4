"""Corpora: sources of documents, ingested once and then immutable.

`store` keeps them, `files/` cuts files into documents, `reader` maps them, `tokenizer` and `documents` make token ids
of them, and `packing` makes batches of these as the `recipe` says. Only this room imports `tokenizers` and `pyarrow`.
Every function blocks: call it from a thread or a runner process.
"""
