"""`import headrace` as a user sees it, each time in an interpreter of its own."""

import importlib.metadata
import subprocess
import sys

import pytest

import headrace
from headrace_client import HeadraceClient


def printed(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    return done.stdout.split()


def test_importing_headrace_loads_neither_grpc_nor_torch_nor_the_client():
    names = printed("import sys, headrace; print(*(name.partition('.')[0] for name in sys.modules))")

    assert "headrace" in names
    assert not {"grpc", "google", "torch", "numpy", "headrace_client"} & set(names)


def test_the_version_needs_no_client():
    version, loaded = printed("import sys, headrace; print(headrace.__version__, 'headrace_client' in sys.modules)")

    assert (version, loaded) == (importlib.metadata.version("headrace"), "False")


def test_the_client_loads_without_torch():
    loaded = printed(
        "import sys, headrace; headrace.HeadraceClient; print('grpc' in sys.modules, 'torch' in sys.modules)"
    )

    assert loaded == ["True", "False"]


def test_headrace_gives_the_client_and_its_connect():
    assert headrace.HeadraceClient is HeadraceClient
    assert headrace.connect == HeadraceClient.connect


def test_connect_returns_a_client():
    with headrace.connect("127.0.0.1:1") as client:
        assert isinstance(client, HeadraceClient)


def test_a_star_import_takes_the_three_names():
    names = printed("from headrace import *; print(HeadraceClient.__name__, connect.__name__)")

    assert names == ["HeadraceClient", "connect"]


def test_stubs_stay_beside_the_client():
    loaded = printed("import sys; from headrace.common.v1 import dtype_pb2; print('headrace_client' in sys.modules)")

    assert loaded == ["False"]


def test_dir_lists_the_names_before_they_are_used():
    assert {"HeadraceClient", "__version__", "connect"} <= set(dir(headrace))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'headrace' has no attribute 'Client'"):
        _ = headrace.Client
