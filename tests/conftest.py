"""Fixtures live in plugins named after what they provide."""

import gc

pytest_plugins = [
    "fix_chassis",
    "fix_client",
    "fix_forked_runner",
    "fix_extractor",  # Builds on the one above.
    "fix_postgres",
    "fix_registry",
    "fix_hub",  # Builds on the one above.
    "fix_hub_datasets",
    "fix_runner",
    "fix_system",
    "fix_train",
]


def pytest_configure():
    """Pauses the garbage collector until all tests are collected: with torch, a million objects that stay."""
    gc.disable()


def pytest_collection_finish():
    """Keeps what was imported out of later collections."""
    gc.freeze()
    gc.enable()
