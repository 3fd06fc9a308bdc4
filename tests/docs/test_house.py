"""The measure itself, on a house of a few lines."""

import textwrap

import pytest

import house

PYPROJECT = '[tool.hatch.build.targets.wheel]\npackages = ["x/headrace_extractor", "x/headrace_registry"]\n'


@pytest.fixture
def rows(tmp_path):
    def measured(files):
        (tmp_path / "pyproject.toml").write_text(PYPROJECT)
        for name, text in {"headrace_registry/residency/pins.py": "", **files}.items():
            path = tmp_path / "x" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return {row.name: row for row in house.measure(tmp_path)}

    return measured


def test_private_functions_used_once_are_counted_and_public_or_shared_ones_are_not(rows):
    code = """
        def public(): return _once() + _twice() + _twice() + other()
        def _once(): return 1
        def _twice(): return 2
        def __special(): return public()
    """

    row = rows({"headrace_extractor/sets/spec.py": code})["private helpers used once, of all functions"]

    assert (row.value, row.ok) == (25.0, False)


def test_words_are_those_of_docstrings_and_comments(rows):
    code = '''
        """Tells what is there, to a reader who waits, in ten words."""
        WHO = "who nobody"  # Its value may be anything.  (noqa)
        what = is_not = None
    '''

    found = rows({"headrace_extractor/sets/spec.py": code})

    assert found["free relatives per 1,000 words, packages"].value == pytest.approx(1000 / 12, abs=0.1)
    assert found["persons per 1,000 words, packages"].value == pytest.approx(1000 / 12, abs=0.1)


def test_generated_stubs_count_nowhere(rows):
    found = rows({"headrace_extractor/v1/row_pb2.py": '"""Somebody: what is it?"""\ndef _f(): _f()\n'})

    assert found["free relatives per 1,000 words, packages"].value == 0
    assert found["private helpers used once, of all functions"].value == 0


def test_a_room_counts_its_own_modules_and_a_flat_core_apart(rows):
    files = {f"headrace_extractor/corpora/m{n}.py": "" for n in range(15)} | {
        "headrace_extractor/corpora/__init__.py": "",
        "headrace_extractor/corpora/files/text.py": "",
        "headrace_extractor/errors.py": "",
    }

    found = rows(files)

    assert found["flat core of the extractor, modules"].value == 1
    assert found["largest room, modules"].value == 15
    assert not found["largest room, modules"].ok


@pytest.mark.parametrize(("n_lines", "ok"), [(70, True), (71, False)])
def test_a_function_has_seventy_lines_at_most(rows, n_lines, ok):
    code = "def long():\n" + "    pass\n" * (n_lines - 1)

    assert rows({"headrace_extractor/sets/spec.py": code})["functions over 70 lines"].ok == ok


def test_loads_and_encodings_count_outside_their_room_and_in_code_alone(rows):
    code = '''
        def f(folder, manifest):
            """Manifest.load is called elsewhere."""
            return Manifest.load(folder), dropped_rows(folder), manifest.retention == "WINDOW"
    '''
    kind = "class ActivationSet:\n    def __init__(self, kind):\n        self.kind = kind\n"

    found = rows(
        {
            "headrace_extractor/extractions/job.py": code,
            "headrace_extractor/runner/extract.py": "Manifest.load(1)\n",
            "headrace_extractor/sets/set.py": kind + "Manifest.load(1)\n",
        }
    )

    assert found["loads of a manifest or index outside sets/ and runner/"].value == 2
    assert found["encodings of WINDOW"].value == 2


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--check"], 1)])
def test_only_a_check_ends_with_an_error(rows, tmp_path, monkeypatch, capsys, flags, status):
    rows({"headrace_extractor/sets/spec.py": "def long():\n" + "    pass\n" * 80})
    monkeypatch.setattr("sys.argv", ["house.py", str(tmp_path), *flags])

    assert house.main() == status

    assert "functions over 70 lines" in capsys.readouterr().out
