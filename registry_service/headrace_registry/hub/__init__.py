"""The Hugging Face hub, reached from a child process: a hung socket or thread there can be killed.

`client.py` and `headers.py` are the parent's side and import no huggingface_hub; `download.py` and `peek.py` are the
children. Both sides speak JSON lines: a job on the child's standard input, then, for a download, leave to go on; events
or an answer on its standard output. At the end of its input, a child has lost its parent and exits.
"""
