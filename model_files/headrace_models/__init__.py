"""The reading of a model's files, in plain Python: no torch, no gRPC, no SQL.

Reads the shape of a network from `config.json`, the tensors of a safetensors file from its header, and the options that
a model is loaded with. Registry and extractor both read through this package, so that they find the same numbers. Files
may come from strangers: besides OSError, a reader raises only the errors of `errors.py`, whatever a file holds.
"""
