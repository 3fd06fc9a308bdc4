"""The memory of one forward pass is kept for the next, and given back at the end."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

_BLOCK_BYTES, _N_BLOCKS = 24 * 2**20, 8
_PAGE_BYTES = 4096

# In a process of its own: the thresholds stay set.
_SCRIPT = f"""
import json, resource
from headrace_extractor.runner.freed_memory import freed_memory_kept

def passes(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        blocks = [b"x" * {_BLOCK_BYTES} for _ in range({_N_BLOCKS})]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * {_PAGE_BYTES}

passes(1)
faults_before, resident_before = passes(4), resident()
with freed_memory_kept():
    passes(1)
    faults_kept, resident_kept = passes(4), resident()
print(json.dumps([faults_before, resident_before, faults_kept, resident_kept, resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_stays_with_the_process_until_the_block_ends() -> None:
    found = subprocess.run([sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True, timeout=60)
    faults_before, resident_before, faults_kept, resident_kept, resident_after = json.loads(found.stdout)

    assert faults_kept < faults_before / 10  # Page faults: the system clears a page for each.
    assert resident_kept - resident_before > _N_BLOCKS * _BLOCK_BYTES / 2
    assert resident_after < resident_before + _BLOCK_BYTES
