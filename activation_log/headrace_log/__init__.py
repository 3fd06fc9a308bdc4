"""The format of activation sets on disk and on the wire, in plain Python: no torch, no gRPC, no SQL.

A set is a folder: `manifest.json`, `segments.jsonl`, and one folder per column with one single-tensor safetensors file
per segment. `docs/format.md` describes it for people; golden bytes in the tests pin it.

The rows of a set, with 0 <= first_kept <= sealed <= committed <= grant:

    rows                   state             owner
    [0, first_kept)        dropped           none: every reader had released them, and their files are gone
    [first_kept, sealed)   sealed segments   the readers; the files never change
    [sealed, committed)    open segment      the writer; readers may read these rows, a crash loses them
    [committed, grant)     may be written    the writer alone
    [grant, ∞)             waits             none, until rows are dropped; a RETAIN set drops none and has no grant

A segment counts as open until its sealing is recorded. Only `committed` ever moves back, and then to `sealed`: after a
crash the next writer computes the rows from there on again.

`first_kept`: `index.dropped_rows`, `SetReader.first_row`; moved by `retention.drop_before`.
`sealed`: `SegmentIndex.n_rows` of some columns, `SetReader.sealed_rows`; moved by `SetWriter.seal` in the background.
`committed`: `SetWriter.next_row`; `SetReader.read` is told it as `end_row`; moved by `SetWriter.commit`.
`grant`: not in this package; the extractor keeps it as `grant_row` and reserves no row from there on.
"""
