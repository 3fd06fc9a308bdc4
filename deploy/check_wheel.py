"""Builds the wheel, installs it into an empty environment and uses it there: `make wheel`.

The environment gets the base dependencies alone, so that an import that belongs to an extra is found here and not by a
user. Then it gets `headrace[cli]`. Needs hatchling and mypy (the `dev` extra) and a package index.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
# Everything that the wheel puts into site-packages: a name more could shadow a package of the user's.
PACKAGES = {
    "headrace",
    "headrace_chassis",
    "headrace_cli",
    "headrace_client",
    "headrace_extractor",
    "headrace_log",
    "headrace_registry",
    "headrace_train",
}
if (ROOT / "model_files").is_dir():
    PACKAGES |= {"headrace_models"}
# An index may be slow, but a step of a minute is a fault of ours.
STEP_DEADLINE_S = 300.0
REMEDY = "headrace[cli]"
IMPORTS = """
import sys
import headrace
assert not {"grpc", "torch"} & set(sys.modules), "import headrace is not light"
import headrace_client
assert headrace.HeadraceClient is headrace_client.HeadraceClient
with headrace.connect("127.0.0.1:1"):
    pass
assert not {"torch", "rich", "typer"} & set(sys.modules), "the client needs an extra"
print(headrace.__version__)
"""


class WheelFault(Exception):
    """The wheel has a fault; the message names it."""


def main() -> int:
    """Checks the wheel; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="headrace-wheel-") as folder:
        try:
            check(Path(folder))
        except WheelFault as fault:
            sys.stderr.write(f"wheel: {fault}\n")
            return 1
    return 0


def check(folder: Path) -> None:
    """Builds, installs and uses the wheel in `folder`; raises WheelFault at the first fault."""
    # No isolation: the build takes the hatchling of constraints.txt, and no second environment is made.
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(ROOT))
    [wheel] = (folder / "dist").glob("*.whl")
    check_record(wheel)

    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install(python, str(wheel))
    version = run(python, "-c", IMPORTS).stdout.strip()
    tell(f"headrace {version}, base: {installed_bytes(folder) / 1e6:.0f} MB")
    check_types(python)

    headrace = folder / "venv" / "bin" / "headrace"
    refused = run(headrace, "--help", ok=False)
    lines = refused.stderr.strip().splitlines()
    if refused.returncode == 0 or len(lines) != 1 or REMEDY not in lines[0]:
        last = lines[-1] if lines else "nothing"
        raise WheelFault(f"without {REMEDY}, `headrace --help` says {len(lines)} lines, not its remedy alone: {last}")

    install(python, f"{wheel}[cli]")
    if "Usage: headrace" not in run(headrace, "--help").stdout:
        raise WheelFault("with headrace[cli], `headrace --help` prints no help")
    tell(f"headrace {version}, with cli: {installed_bytes(folder) / 1e6:.0f} MB")


def check_record(wheel: Path) -> None:
    """Compares the names at the top of the wheel with PACKAGES; each package says that it is typed."""
    with ZipFile(wheel) as archive:
        [record] = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        paths = {line[0] for line in csv.reader(archive.read(record).decode().splitlines())}
    info = record.partition("/")[0]
    names = {path.partition("/")[0] for path in paths}
    if names != PACKAGES | {info}:
        raise WheelFault(f"top-level names differ from the list: {sorted(names ^ (PACKAGES | {info}))}")
    wanted = {f"{name}/py.typed" for name in PACKAGES} | {f"{name}/__init__.py" for name in PACKAGES}
    if missing := (wanted | {f"{info}/licenses/LICENSE"}) - paths:
        raise WheelFault(f"files are missing: {sorted(missing)}")
    tell(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(paths)} files, {', '.join(sorted(PACKAGES))}")


def check_types(python: Path) -> None:
    """Checks a user's script with mypy --strict against the installed client."""
    checker = ("-m", "mypy", "--strict", "--no-incremental", "--config-file=", "--python-executable", str(python))
    run(Path(sys.executable), *checker, str(ROOT / "tests" / "client" / "user_script.py"))
    tell("a user's script passes mypy --strict")


def install(python: Path, requirement: str) -> None:
    """Installs into an environment that has no pip of its own, at the versions of constraints.txt."""
    # --no-compile: the size is that of the files as delivered, and compiling them takes as long as fetching them.
    pip("--python", str(python), "install", "--no-compile", "--constraint", str(ROOT / "constraints.txt"), requirement)


def pip(*args: str) -> None:
    """Runs this interpreter's pip quietly."""
    run(Path(sys.executable), "-m", "pip", "--quiet", "--disable-pip-version-check", *args)


def run(program: Path, *args: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a program outside the checkout, because its folders must not be importable; `ok` demands exit status 0."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [program, *args], capture_output=True, text=True, cwd="/", env=env, timeout=STEP_DEADLINE_S, check=False
    )
    if ok and done.returncode != 0:
        raise WheelFault(f"`{program.name} {' '.join(args)}` failed:\n{done.stdout}{done.stderr}")
    return done


def installed_bytes(folder: Path) -> int:
    """Bytes of the environment's packages."""
    return sum(path.lstat().st_size for path in (folder / "venv" / "lib").rglob("*") if path.is_file())


def tell(line: str) -> None:
    """Prints at once, since each step takes seconds."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
