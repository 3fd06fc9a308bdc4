"""The torch room: a child process, started as `python -m headrace_extractor.runner`, that holds one model.

It loads the model, runs forward passes over a corpus and writes their activations into the log; it also converts,
quantizes and tries models. `node/runner_protocol.py` has its commands and events. `process` is the frame; `models` puts
a model on its device, `hooks` binds hookpoints to it, `passes` turns documents into rows.

Of the server only this package imports torch and transformers, and no other package imports this one: to unload a
model, end its process.
"""
