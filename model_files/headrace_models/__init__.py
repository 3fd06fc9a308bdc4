"""What the files of a model say, in plain Python: no torch, no gRPC, no SQL.

Reads the shape of a network from `config.json`, the tensors of a safetensors file from its header, and the options that
a model is loaded with. Registry and extractor both read through this package, so that they find the same numbers. Every
file may come from a stranger: a file that is not as it should be raises an error of `errors.py`, and no other.
"""
