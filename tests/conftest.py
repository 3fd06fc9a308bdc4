"""Fixtures live in plugins named after what they provide."""

pytest_plugins = ["fix_chassis", "fix_extractor", "fix_runner", "fix_client", "fix_postgres", "fix_registry", "fix_system", "fix_train"]
