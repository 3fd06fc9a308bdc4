"""Cuts files into documents: `parsers` for text, JSON lines and CSV, `parquet`, and `arrays` for NumPy's `.npy`.

A parser is a generator of documents as bytes: it takes an open, seekable file, reads it once, and holds a few documents
at a time. `contents` turns the values that a parser finds into such bytes: text, conversations or token ids. A file
that can't be read raises CorpusMalformed with the place of the error; documents yielded before stay valid.
"""
