"""The Hugging Face hub, reached from a child process: a hung socket or thread there can be killed.

`client.py` is the parent's side and imports no huggingface_hub; `download.py` is the child. They speak JSON lines: a
job on the child's standard input, then leave to go on, events on its standard output. When its input ends, its parent
is gone and it exits.
"""
