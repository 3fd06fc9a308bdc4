"""Passes over a corpus: documents in, rows in the log out.

`extract` is the loop. `forward` runs the model over a batch and brings activations to the host; `rows` copies them into
the log's mapped memory, `quantized_rows` in 8 bits; `parity` compares a few documents with plain transformers;
`statistics` sums up a segment. A row's bits depend on the set, on its number and on the machine, never on when a run
was stopped and resumed.
"""
