"""The command in an install without the packages of the extra `cli`."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from {module} import main
sys.exit(main())
"""


def run_without(package, module, *arguments):
    program = WITHOUT.format(package=package, module=module)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("package", ["rich", "typer"])
@pytest.mark.parametrize("arguments", [["--help"], ["models", "list"]])
def test_a_missing_package_is_one_line_that_names_the_remedy(package, arguments):
    done = run_without(package, "headrace_cli.__main__", *arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"headrace: {package} is not installed; run: pip install 'headrace[cli]'\n"
