"""The trainer in an install without the packages of an extra."""

import signal

import pytest

from fix_absent import run_without
from fix_scripted_extractor import EXTRACTION_ID
from fix_terminal import into_closed_pipe

MAIN = """
from headrace_train.__main__ import main
sys.exit(main())
"""
REPORTER = """
import io
from headrace_train.reporting.reporters import new_reporter

class Terminal(io.StringIO):
    def isatty(self):
        return True

print(type(new_reporter(Terminal(), as_json=False)).__name__)
"""


@pytest.mark.parametrize("package", ["rich", "typer", "sae_lens", "torch"])
def test_help_needs_no_extra(package):
    done = run_without(package, MAIN, "--help")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("package", "reporter"), [("rich", "LineReporter"), ("typer", "BarReporter")])
def test_progress_comes_in_lines_where_rich_is_missing(package, reporter):
    done = run_without(package, REPORTER)

    assert (done.stdout.strip(), done.stderr) == (reporter, "")


def test_a_missing_package_is_one_line_that_names_the_remedy(planted_registry, tmp_path):
    flags = ["--registry", planted_registry.address, "--extraction", EXTRACTION_ID, "--out", str(tmp_path / "out")]

    done = run_without("sae_lens", MAIN, *flags)

    assert done.returncode == 2
    assert done.stderr == "headrace-train: sae_lens is not installed; run: pip install 'headrace[train]'\n"


def test_a_reader_that_is_gone_ends_the_trainer_in_silence(planted_registry, tmp_path):
    flags = ["--registry", planted_registry.address, "--extraction", EXTRACTION_ID, "--out", tmp_path / "out"]

    done = into_closed_pipe(flags, module="headrace_train")

    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")
