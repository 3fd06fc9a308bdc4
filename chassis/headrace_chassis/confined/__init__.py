"""Functions that read bytes from outside, run in child processes with limits on memory, time and output.

A parser in a server can take its memory, its interpreter or its life; in a child it takes the child's. `Confined` runs
a function of ours in a child and gives its answer, the error that it raised, or a refusal that names the limit. `pool`
and `talk` are the server's side. `zygote` is one small process for each server, from which the children are forked: the
start of an interpreter takes a hundred times longer. `child` is a child's life. Nothing but JSON comes back from it.
"""
