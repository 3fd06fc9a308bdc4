"""The contract is enough: generated stubs do the whole job, and reflection lists the services."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fix_system import HOOKPOINT, TOKEN, columns_of

pytestmark = pytest.mark.timeout(240)

SCRIPT = Path(__file__).with_name("stub_client.py")


def test_a_client_of_generated_stubs_does_the_whole_job(system, text_llama, tmp_path):
    output = tmp_path / "rows.npz"
    arguments = [system.registry.address, TOKEN, str(text_llama), "by-stubs", "by-stubs", str(output)]

    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], check=False, capture_output=True, text=True, timeout=200
    )

    assert done.returncode == 0, done.stderr
    theirs = np.load(output)
    extraction = next(each for each in system.client.extractions.list() if each.corpus_id == "by-stubs")
    with system.client.chunks(extraction, columns_of(extraction)) as stream:
        ours = [chunk.arrays for chunk in stream]
    for name in columns_of(extraction):
        mine = np.concatenate([arrays[name] for arrays in ours])
        assert np.array_equal(theirs[name].reshape(mine.shape), mine)
    assert theirs[HOOKPOINT].shape == (extraction.n_rows, 32)
    assert np.abs(theirs[HOOKPOINT]).max() > 0.1


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (
            "registry",
            {
                "headrace.registry.v1.ModelService",
                "headrace.registry.v1.ResidencyService",
                "headrace.registry.v1.NodeService",
                "headrace.registry.v1.ActivationSetService",
            },
        ),
        ("extractor", {"headrace.extractor.v1.ExtractionService", "headrace.extractor.v1.CorpusService"}),
    ],
)
def test_reflection_lists_the_services_and_describes_them(system, server, expected):
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    requests += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(expected)]
    with grpc.insecure_channel(getattr(system, server).address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, *described = stub.ServerReflectionInfo(iter(requests), metadata=system.metadata, timeout=30)

    names = {service.name for service in listed.list_services_response.service}
    reflections = {f"grpc.reflection.{version}.ServerReflection" for version in ("v1", "v1alpha")}
    assert names == expected | {"grpc.health.v1.Health"} | reflections
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in described)
