"""Hookpoints of a loaded model: from a name to a tensor of one forward pass.

`binding` finds the module behind each name and checks that its values fit the name; `structure` does so for
architectures that the catalogue does not know. `capture` takes the tensors during a pass, `takes` cuts them out of
fused ones. `isolation` keeps documents that share a sequence apart. Nothing here knows of corpora, rows or the log.
"""
