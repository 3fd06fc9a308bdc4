"""How a node lists its devices, with an nvidia-smi made by the tests."""

from __future__ import annotations

import importlib.util

import psutil
import pytest

from headrace_chassis.errors import StartError
from headrace_extractor import __main__ as extractor
from headrace_extractor.node.devices import device_lister, machine_reader
from headrace_extractor.node.values import Device

MIB = 1024 * 1024


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Installs a program that answers as told, and refuses `compute_cap` if told so."""

    def install(answer: str, *, old: bool = False) -> None:
        refusal = 'case "$1" in *compute_cap*) exit 2;; esac\n' if old else ""
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{refusal}cat <<'END'\n{answer}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def with_flash_attention(monkeypatch, *, installed: bool) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: (object() if installed else None) if name == "flash_attn" else find(name, package),
    )


def test_gpus_tell_name_capability_total_and_free(nvidia_smi, monkeypatch):
    with_flash_attention(monkeypatch, installed=True)
    nvidia_smi("0, NVIDIA H200, 143771, 140000, 9.0\n1, Tesla V100, 16384, 16000, 7.0")
    first, second = device_lister("", 0)()

    assert (first.id, first.kind, first.name, first.capability) == ("cuda:0", "cuda", "NVIDIA H200", "9.0")
    assert (first.total_bytes, first.free_bytes) == (143771 * MIB, 140000 * MIB)
    assert first.capacity_bytes < first.total_bytes
    assert (first.flash_attention, second.flash_attention) == (True, False)


def test_without_the_package_no_gpu_has_flash_attention(nvidia_smi, monkeypatch):
    with_flash_attention(monkeypatch, installed=False)
    nvidia_smi("0, NVIDIA H200, 143771, 140000, 9.0")

    assert not device_lister("cuda", 0)()[0].flash_attention


def test_a_driver_that_does_not_know_capabilities_still_lists_its_gpus(nvidia_smi):
    nvidia_smi("0, Tesla K80, 11441, 11000", old=True)
    (device,) = device_lister("cuda:0", 0)()

    assert (device.name, device.capability, device.flash_attention) == ("Tesla K80", "", False)


def test_gpus_stay_listed_while_the_driver_does_not_answer(nvidia_smi, tmp_path):
    nvidia_smi("0, NVIDIA H200, 143771, 140000, 9.0\n1, NVIDIA H200, 143771, 139000, 9.0")
    devices = device_lister("", 0)
    before = devices()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")

    assert devices() == before
    nvidia_smi("0, NVIDIA H200, 143771, 100, 9.0\n1, NVIDIA H200, 143771, 200, 9.0")
    assert [device.free_bytes for device in devices()] == [100 * MIB, 200 * MIB]


@pytest.mark.parametrize("wanted", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_there_is_not_the_cpu(nvidia_smi, wanted):
    nvidia_smi("0, NVIDIA H200, 143771, 140000, 9.0" if wanted == "cuda:7" else "")

    with pytest.raises(StartError, match="nvidia-smi lists no such GPU"):
        device_lister(wanted, 0)


def test_the_cpu_has_the_machines_memory():
    (device,) = device_lister("cpu", 5 * MIB)()

    assert (device.capacity_bytes, device.total_bytes) == (5 * MIB, psutil.virtual_memory().total)
    assert not device.lost_bytes


@pytest.mark.parametrize(
    ("capacities", "flag", "expected"),
    [((63 * 10**9,), None, 3), ((32 * 10**9, 32 * 10**9), None, 0), ((10**9,), 0, 0), ((10**12,), 5, 5)],
)
def test_a_small_node_holds_three_models_unless_told(capacities, flag, expected):
    devices = [
        Device(id=f"cuda:{n}", kind="cuda", name="", capacity_bytes=c, free_bytes=c) for n, c in enumerate(capacities)
    ]
    machine = machine_reader(devices, max_loads=2, max_residents=flag)()

    assert (machine.max_loads, machine.max_residents) == (2, expected)
    assert 0 < machine.memory_free_bytes <= machine.memory_bytes


def test_the_limits_are_flags(capsys):
    args = extractor.parse(["--data-dir", "d"])
    assert (args.max_loads, args.max_residents) == (2, None)
    args = extractor.parse(["--data-dir", "d", "--max-loads", "0", "--max-residents", "7"])
    assert (args.max_loads, args.max_residents) == (0, 7)
    with pytest.raises(SystemExit):
        extractor.parse(["--data-dir", "d", "--max-loads", "-1"])
    assert "0 (no limit) to 10000" in capsys.readouterr().err


def test_a_device_nobody_knows_is_refused(capsys):
    with pytest.raises(SystemExit):
        extractor.parse(["--data-dir", "d", "--device", "gpu"])
    assert "takes cpu, cuda, cuda:N or mps" in capsys.readouterr().err


def test_a_cpu_has_a_name_for_people():
    (device,) = device_lister("cpu", 0)()

    assert device.name.strip()
    assert len(device.name) <= 255
