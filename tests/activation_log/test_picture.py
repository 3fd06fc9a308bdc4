"""The intervals of a set's rows are drawn with the same words in the package, the docs and the contract."""

from pathlib import Path

import headrace_log

ROOT = Path(__file__).parents[2]


def picture(text: str) -> str:
    """Returns the lines from the borders to the last interval and the paragraph behind them, without indentation."""
    lines = [line.strip().removeprefix("//").strip() for line in text.splitlines()]
    lines = [line for line in lines if line and line != "```"]
    start = next(at for at, line in enumerate(lines) if line.startswith("The rows of a set, with"))
    return " ".join(lines[start : start + 9])


def test_the_picture_of_row_intervals_is_the_same_in_package_docs_and_contract():
    in_package = picture(headrace_log.__doc__)

    assert picture((ROOT / "docs/format.md").read_text(encoding="utf-8")) == in_package
    contract = (ROOT / "protos/headrace/extractor/v1/extraction_service.proto").read_text(encoding="utf-8")
    assert picture(contract) == in_package
    assert all(border in in_package for border in ("[0, first_kept)", "[sealed, committed)", "[grant, ∞)"))
    assert in_package.endswith("computes the rows from there on again.")
