"""Fixtures live in plugins named after what they provide."""

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
