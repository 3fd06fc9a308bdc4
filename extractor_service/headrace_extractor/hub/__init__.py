"""Datasets of the Hugging Face hub, read as streams.

`client` starts a child process for each dataset and takes documents from it: a hung socket or thread of the libraries
can then be killed. `reading`, in the child, alone imports `datasets` and `huggingface_hub`, which are optional here.
`job` is the protocol between the two. No document is kept on this disk by this room.
"""
