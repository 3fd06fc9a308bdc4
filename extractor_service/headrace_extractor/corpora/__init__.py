"""Corpora: sources of documents, ingested once and then immutable.

`store` keeps them, `parsers` and `parquet` cut files into documents, `reader` maps them, `tokenizer` and `documents`
turn them into what `headrace_extractor.packing` reads. This room alone imports `tokenizers` and `pyarrow`. Everything
blocks: call it from a thread or a runner process.
"""
