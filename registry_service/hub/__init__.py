"""The Hugging Face hub, reached from a child process: a hung socket or thread there can be killed.

Only `download.py`, which runs in the child, imports huggingface_hub. Parent and child speak JSON lines: one job on the
child's standard input, events on its standard output. When its input ends, its parent is gone and it exits.
"""
