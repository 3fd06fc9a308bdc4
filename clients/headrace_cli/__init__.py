"""The `headrace` command line. Commands import gRPC, numpy and rich when they run: `--help` stays quick."""
