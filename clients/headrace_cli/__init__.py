"""The `headrace` command line. Modules import what is heavy inside the commands, so that `--help` stays quick."""
