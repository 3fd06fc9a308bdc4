"""Corpora: sources of documents, ingested once and then immutable.

`store` keeps corpora, `files/` cuts files into documents, and `reader` maps a stored corpus. `tokenizer` and
`documents` turn documents into token ids, `packing` packs these into batches under a `recipe`, and `counting` counts
the rows. Only this room imports `tokenizers`, `pyarrow` and `jinja2`. Every function blocks: call it from a thread or a
runner process.
"""
