"""The command in an install without the packages of the extra `cli`."""

import pytest

from fix_absent import run_without

MAIN = """
from headrace_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("package", ["rich", "typer"])
@pytest.mark.parametrize("arguments", [["--help"], ["models", "list"]])
def test_a_missing_package_is_one_line_that_names_the_remedy(package, arguments):
    done = run_without(package, MAIN, *arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"headrace: {package} is not installed; run: pip install 'headrace[cli]'\n"
