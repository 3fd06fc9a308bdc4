"""A user's script under mypy --strict, against the client as a wheel installs it."""

import os
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "user_script.py"


def run(*command):
    words = [str(one) for one in command]
    # Without PYTHONPATH, by which the checkout itself could be found.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_user_s_script_passes_mypy_strict_against_the_installed_client(tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    [wheel] = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    # The dependencies of this environment; as a bare path, so that its editable install is not followed.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    assert site.getsitepackages() != [str(packages)]

    where = run(python, "-c", "import headrace_client; print(headrace_client.__file__)").strip()
    checker = ("-m", "mypy", "--strict", "--no-incremental", "--config-file=", "--python-executable", python)
    told = run(sys.executable, *checker, SCRIPT)

    assert where.startswith(str(packages))
    assert "no issues found" in told
