"""The torch room: a child process, started as `python -m headrace_extractor.runner`, that holds one model.

It loads the model, runs forward passes and writes their activations into the log; `runner_protocol` is what it says and
hears. Only this package of the server imports torch and transformers, and nothing imports this package: to unload a
model, end its process.
"""
