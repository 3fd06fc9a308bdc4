"""Processes in which a package is not installed."""

import subprocess
import sys

_PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{code}
"""


def run_without(package, code, *arguments):
    """Runs Python code in a process that can't import `package`; returns the finished process."""
    command = [sys.executable, "-c", _PROGRAM.format(package=package, code=code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
