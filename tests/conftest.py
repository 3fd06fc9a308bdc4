"""Fixtures live in plugins named after what they provide."""

import gc

import pytest

pytest_plugins = [
    "fix_chassis",
    "fix_client",
    "fix_terminal",  # Builds on the one above.
    "fix_confined",
    "fix_forked_runner",
    "fix_extractor",  # Builds on the one above.
    "fix_postgres",
    "fix_registry",
    "fix_hub",  # Builds on the one above.
    "fix_hub_datasets",
    "fix_runner",
    "fix_system",
    "fix_train",
    "fix_ways",
]

# The fixtures of `fix_system.py` that start servers for the session, with the files of which most tests use them.
_SHARED = {
    "fragile": ("test_system_faults.py", "test_system_restart.py"),
    "system": tuple(
        f"test_system_{name}.py"
        for name in "bad_input eight_bits export hookpoints mapped numbers readers recipes stubs window".split()
    ),
}
_LONGEST_FIRST = ("tests/system/", "tests/extractor/", "tests/registry/", "tests/runner/", "")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Pauses the garbage collector while tests are collected: with torch, a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Has the tests come first that take longest, so that the processes end at about the same time."""
    items.sort(key=lambda item: next(n for n, part in enumerate(_LONGEST_FIRST) if part in item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Has one process run a file, for the fixtures of its module, and all files that share servers of the session."""
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 -- only where xdist distributes tests

    class ByServers(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            return next((servers for servers, names in _SHARED.items() if file.endswith(names)), file)

    return ByServers(config, log) if config.getoption("dist") == "loadfile" else None
