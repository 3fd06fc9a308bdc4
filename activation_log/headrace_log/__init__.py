"""The format of activation sets on disk and on the wire, in plain Python: no torch, no gRPC, no SQL.

A set is a folder: `manifest.json`, `segments.jsonl`, and one folder per column with one single-tensor safetensors file
per segment. `docs/format.md` describes it for people; golden bytes in the tests pin it.
"""
