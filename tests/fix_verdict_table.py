"""The verdicts on architectures as a table: docs/architectures.md is written and read here."""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES_MD = Path(__file__).parents[1] / "docs" / "architectures.md"
EXACT, ROUNDED, REFUSED = "exact", "within rounding", "refused"
AT_REGISTRATION = "refused at registration"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the rows of one architecture come out, alone and packed; `why` has the reason of a refusal."""

    model_type: str
    alone: str
    packed: str = ""
    sites: tuple[str, ...] = ()
    why: str = ""


_PREFACE = """# Architectures

`make zoo` builds a small random model of every text architecture that the installed transformers ({version}) knows,
saves it, loads it as a runner does, and compares each offered hookpoint with values from hooks that share no code with
Headrace. It writes this table.

- *alone*: rows of one document at a time. *exact*: the bits of transformers' own forward pass.
- *packed*: rows of documents that share a sequence, long ones before short ones, longer than every window, chunk and
  scale of the config, compared with each document alone. *refused*: use `packing=one_document`.
- *beside the residual stream*: the hookpoints that are offered, beside `hook_resid_pre` and `hook_resid_post` of every
  block. [hookpoints.md](hookpoints.md) says what they are.

{n_captured} of {n_all} are captured; the others are refused, with the reason that is given here.

| model type | alone | packed | beside the residual stream | reason |
| --- | --- | --- | --- | --- |
"""
_STREAM = ("hook_resid_pre", "hook_resid_post")


def document_of(verdicts):
    """Returns the text of docs/architectures.md."""
    from transformers import __version__

    verdicts = sorted(verdicts, key=lambda verdict: verdict.model_type)
    n_captured = sum(bool(verdict.sites) for verdict in verdicts)
    preface = _PREFACE.format(version=__version__, n_captured=n_captured, n_all=len(verdicts))
    return preface + "".join(f"{line_of(verdict)}\n" for verdict in verdicts)


def line_of(verdict):
    """Returns a verdict's line of the table."""
    sites = ", ".join(f"`{site}`" for site in verdict.sites if site not in _STREAM)
    why = re.sub(r"\s+", " ", verdict.why).replace("|", "/")
    return f"| `{verdict.model_type}` | {verdict.alone} | {verdict.packed} | {sites} | {why} |".replace("  ", " ")


def lines_of_document():
    """Returns the lines of the table in docs/architectures.md by model type."""
    lines = ARCHITECTURES_MD.read_text(encoding="utf-8").splitlines()
    found = {match[1]: line for line in lines if (match := re.match(r"\| `([^`]+)` \|", line))}
    assert found, "run `make zoo`"
    return found
