"""The benchmarks' own machinery, on a set of a few MB."""

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest
from rich.console import Console

from bench import gpu, reading, wire
from bench.figures import compare, save, show
from bench.interleave import interleave
from bench.replay import make_replay_set


def test_a_ratio_is_that_of_the_medians_and_knows_its_sense():
    fast = compare("speed", [1.0, 9.0, 6.0], [2.0, 3.0, 100.0], target=2.0, unit="rows/s")
    slow = compare("memory", [6.0], [3.0], target=1.5, unit="MB", sense="max")

    assert (fast.ratio, fast.a, fast.b, fast.met) == (2.0, 6.0, 3.0, True)
    assert not slow.met


def test_sides_take_turns_in_alternating_order():
    calls = []

    values = interleave({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, rounds=3)

    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_a_missed_target_is_shown_and_saved(tmp_path):
    console = Console(record=True, width=100)
    figures = [compare("wire", [1.0], [2.0], target=0.9, unit="MB/s")]

    show(figures, console)
    save(figures, tmp_path / "new" / "latest.json")

    assert "missed" in console.export_text()
    assert '"ratio": 0.5' in (tmp_path / "new" / "latest.json").read_text()


def test_a_figure_may_have_no_target():
    console = Console(record=True, width=100)
    figure = compare("depth", [1.0], [4.0], unit="s", sense="max")

    show([figure], console)

    assert figure.met
    assert "0.25" in console.export_text()


def test_every_side_of_the_wire_benchmark_delivers_the_same_bytes(tmp_path):
    pytest.importorskip("pyarrow.flight")
    replay = make_replay_set(tmp_path / "data", 4_000_000)

    with ExitStack() as stack:
        sides = [wire.Side(stack, kind, replay, tmp_path) for kind in wire.KINDS]
        passes = [side.stream_once() for side in sides]

    assert len({done.checksum for done in passes}) == 1
    assert passes[0].checksum > 0


def test_every_side_of_the_reading_benchmark_reads_the_same_rows(tmp_path):
    figures = reading.measure(tmp_path, Console(quiet=True), rounds=1, set_bytes=20_000_000)

    assert [figure.target for figure in figures] == [5.0, 0.5, 0.8, 0.8]
    assert all(figure.a > 0 for figure in figures)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_way_of_the_gpu_benchmark_works_without_one(tmp_path):
    output = tmp_path / "results" / "today.json"
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--device", "cpu", "--rounds", "1", "--output", str(output)]
    subprocess.run(command, check=True, timeout=280)

    found = json.loads(output.read_text())
    assert [figure["target"] for figure in found["figures"]] == [0.9, 0.9, 0.95, 1.0]
    assert all(figure["a"] > 0 < figure["b"] for figure in found["figures"])
    assert sum("bytes of the device in use" in name for name in found["values"]) == 3
    assert sum("gpt2-tiny" in name for name in found["values"]) == 2


def test_without_a_gpu_its_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    monkeypatch.setattr("bench.gpu_memory.describe", dict)

    assert gpu.main() == 1
    assert "no NVIDIA GPU" in capsys.readouterr().out
