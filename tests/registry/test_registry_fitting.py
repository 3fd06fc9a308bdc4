"""Registration with a limit of memory: the most exact quantization that fits is taken."""

from __future__ import annotations

import asyncio

import pytest

from fix_postgres import refused, running_registry
from fix_registry import GIB, cpu, write_model
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.errors import ModelTooLarge
from headrace_registry.models.models import Quantization
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.catalog import CATALOG
from headrace_registry.sizing.estimate import estimate
from headrace_registry.sizing.fitting import fitting_quantization
from headrace_registry.sizing.reservation import USUAL_WORKLOAD
from headrace_registry.sizing.tensors import Form

PROFILE = CATALOG.of_repo("mistralai/Mistral-7B-v0.1").profile
BYTES = {
    quantization: estimate(
        PROFILE,
        Form(quantization=quantization, dtype="bfloat16"),
        kind=DeviceKind.CUDA,
        workload=USUAL_WORKLOAD,
    ).total_bytes
    for quantization in (Quantization.NONE, Quantization.INT8, Quantization.INT4)
}


def chosen(fit_bytes, **fields):
    return fitting_quantization(PROFILE, {}, fit_bytes, DeviceKind.CUDA, **fields)


@pytest.mark.parametrize("quantization", BYTES)
def test_the_most_exact_quantization_that_fits_is_chosen(quantization):
    assert chosen(BYTES[quantization]) is quantization
    assert BYTES[Quantization.NONE] > BYTES[Quantization.INT8] > BYTES[Quantization.INT4]


def test_a_wish_is_the_most_exact_that_is_taken():
    assert chosen(10 * BYTES[Quantization.NONE], wanted=Quantization.INT8) is Quantization.INT8
    assert chosen(10 * BYTES[Quantization.NONE], wanted=Quantization.INT2) is Quantization.INT2


def test_a_model_that_fits_in_no_form_is_refused_with_its_sizes():
    with pytest.raises(ModelTooLarge, match=f"{BYTES[Quantization.INT4]} bytes as int4"):
        chosen(BYTES[Quantization.INT4] - 1)


async def test_a_private_repo_is_fitted_with_the_token_of_the_call(hub, database_url, tmp_path):
    hub.token = "hf_0123456789secret"
    source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny"))
    request = pb.RegisterModelRequest(model=model_pb2.Model(source=source), fit_bytes=64 * GIB)
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        without = await refused(registry.stubs.models.RegisterModel(request, timeout=40))
        request.hub_token = hub.token
        model = (await registry.stubs.models.RegisterModel(request, timeout=40)).model

    assert without.reason == "HUB_GATED"
    assert model.quantization == model_pb2.QUANTIZATION_NONE


async def test_a_gguf_file_is_fitted_to_no_limit(registry, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(tmp_path / "m.gguf")))
    request = pb.RegisterModelRequest(model=model_pb2.Model(source=source), fit_bytes=4 * GIB)
    refusal = await refused(registry.stubs.models.RegisterModel(request, timeout=20))

    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("fit_bytes",))


async def test_registration_takes_the_form_that_fits_the_living_devices(registry, tmp_path, start_node):
    await start_node(devices=[cpu(4 * GIB)])
    await asyncio.to_thread(write_model, tmp_path / "tiny")
    source = model_pb2.ModelSource(folder=model_pb2.FolderSource(path=str(tmp_path / "tiny")))

    async def register(fit_bytes):
        request = pb.RegisterModelRequest(model=model_pb2.Model(source=source), fit_bytes=fit_bytes)
        return (await registry.stubs.models.RegisterModel(request, timeout=20)).model

    model = await register(4 * GIB)
    again = await register(4 * GIB)
    small = await refused(register(1000))

    assert model.quantization == model_pb2.QUANTIZATION_NONE
    assert again.id == model.id
    assert small.reason == "MODEL_TOO_LARGE"
    assert (await refused(register(-1))).fields == ("fit_bytes",)
