"""Where a server can be found, and who may look into its folder."""

import os
import socket
import stat

import pytest

from headrace_chassis.advertising import advertised
from headrace_chassis.data_folder import make_private
from headrace_chassis.errors import AddressInvalid


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_data_folder_and_all_in_it_are_for_its_owner_alone(tmp_path):
    make_private(tmp_path / "data")
    (tmp_path / "data" / "sets").mkdir()
    (tmp_path / "data" / "rows").write_bytes(b"x")

    assert [mode(tmp_path / "data" / name) for name in ("", "sets", "rows")] == [0o700, 0o700, 0o600]


def test_a_folder_that_an_operator_opened_for_a_group_stays_so(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o750)

    make_private(tmp_path / "data")
    (tmp_path / "data" / "sets").mkdir()
    (tmp_path / "data" / "rows").write_bytes(b"x")

    assert [mode(tmp_path / "data" / name) for name in ("", "sets", "rows")] == [0o750, 0o750, 0o640]
    assert "chmod 700" in caplog.text


def test_an_address_given_is_advertised():
    assert advertised("0.0.0.0:7471", given="gpu1:7471", towards=[]) == "gpu1:7471"
    assert advertised("127.0.0.1:7471", given="unix:/run/x", towards=[]) == "unix:/run/x"


@pytest.mark.parametrize("given", ["0.0.0.0:7471", "[::]:7471", ":7471", "gpu1:0", "gpu1"])
def test_an_address_that_nobody_can_reach_is_refused_naming_the_flag(given):
    with pytest.raises(AddressInvalid, match="--advertise"):
        advertised("127.0.0.1:7471", given=given, towards=[])


@pytest.mark.parametrize("listening", ["127.0.0.1:7471", "gpu1:7471", "[::1]:7471", "unix:/run/x"])
def test_the_address_listened_on_is_advertised(listening):
    assert advertised(listening, given="", towards=["127.0.0.1:7470"]) == listening


@pytest.fixture
def routes(monkeypatch):
    """This machine's address on the way to others, which a test may change."""
    found = {"127.0.0.1:7470": "127.0.0.1", "registry.example.org:7470": "10.0.0.5", "192.0.2.1:9": "10.0.0.7"}
    monkeypatch.setattr("headrace_chassis.advertising._own_address", lambda towards, _: found.get(towards))
    return found


def test_in_place_of_every_interface_stands_the_one_towards_the_registry(routes):
    assert advertised("0.0.0.0:7471", given="", towards=["registry.example.org:7470"]) == "10.0.0.5:7471"
    assert advertised("[::]:7471", given="", towards=["unix:/x", "registry.example.org:7470"]) == "10.0.0.5:7471"


@pytest.mark.parametrize("registry", ["127.0.0.1:7470", "unix:/x"])
def test_every_interface_is_not_loopback_beside_a_registry_on_loopback(routes, registry, caplog):
    assert advertised("0.0.0.0:7471", given="", towards=[registry]) == "10.0.0.7:7471"
    assert not caplog.text


def test_loopback_is_advertised_with_a_warning_where_no_way_leads_elsewhere(routes, caplog):
    del routes["192.0.2.1:9"]

    assert advertised("0.0.0.0:7471", given="", towards=["127.0.0.1:7470"]) == "127.0.0.1:7471"
    assert "other machines can't reach 127.0.0.1:7471" in caplog.text


def test_a_machine_without_a_way_to_anywhere_asks_for_the_flag(monkeypatch):
    def unreachable(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)

    with pytest.raises(AddressInvalid, match="--advertise HOST:PORT"):
        advertised("0.0.0.0:7471", given="", towards=["registry.example.org:7470"])


def test_an_address_of_loopback_for_other_machines_is_worth_a_warning(caplog):
    advertised("127.0.0.1:7471", given="", towards=["registry.example.org:7470"])

    assert "other machines can't reach 127.0.0.1:7471" in caplog.text
