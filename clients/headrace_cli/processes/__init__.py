"""Processes on this machine: a lock held by one of them at a time, and the servers that `headrace up` keeps running."""
