"""Judges every text architecture of the installed transformers, and keeps the verdicts in docs/architectures.md.

`python tests/zoo.py` judges all of them and writes the table; with model types as arguments it judges these and prints
them. It ends with 1 if a hookpoint has values that are not what its name says.
"""

# ruff: noqa: T201 -- a command that people run for its output

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from fix_architectures import model_types
from fix_verdict_table import ARCHITECTURES_MD, document_of, line_of
from fix_verdicts import Wrong, judge


def main(wanted):
    """Judges the wanted model types; all of them, if none is given. Returns the exit status."""
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # The models are too small for more.
    verdicts, wrong = [], []
    for model_type in wanted or model_types():
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdicts.append(judge(model_type, Path(folder) / "model"))
                print(line_of(verdicts[-1]), flush=True)
            except Wrong as exc:
                wrong.append(model_type)
                print(f"| `{model_type}` | WRONG: {exc} |", flush=True)
    if not wanted and not wrong:
        ARCHITECTURES_MD.write_text(document_of(verdicts), encoding="utf-8")
    print(f"{len(verdicts)} judged, {len(wrong)} wrong: {' '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
