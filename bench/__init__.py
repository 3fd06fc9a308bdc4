"""Benchmarks: every figure is the ratio of two things measured in turns within one run.

Run them with `make bench`, or `python -m bench` in an environment that has the project and `bench/requirements.txt`.
"""
