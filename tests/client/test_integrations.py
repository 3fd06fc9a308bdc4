"""Trainers of other projects, unmodified, on streams: the real libraries where they are installed."""

# ruff: noqa: PLC0415 -- imported by the tests that need them

import importlib
import importlib.util
import json
import math
import sys
import types
import warnings
from itertools import islice

import numpy as np
import pytest
import torch

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, SECOND
from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace_client.errors import DataLoss, FailedPrecondition, InvalidArgument
from headrace_client.integrations import dictionary_learning as for_dictionary_learning
from headrace_client.integrations import sae_lens as for_sae_lens
from headrace_client.integrations import sparsify as for_sparsify
from headrace_client.reading.scaling import dictionary_learning_norm, sae_lens_factor
from headrace_client.values import Column, ColumnStatistics, Dtype, StreamHeader

BATCH = 50


@pytest.fixture
def statistics(scripted_extractor):
    """The scripted extractor sends the statistics of its rows."""
    for name in (HOOKPOINT, SECOND):
        rows = scripted_extractor.column(name).astype(float)
        norms = np.sqrt((rows**2).sum(1))
        sent = {"mean_norm": norms.mean(), "mean_squared_norm": (norms**2).mean()}
        scripted_extractor.statistics.append(service_pb.ColumnStatistics(name=name, count=len(rows), **sent))
    return {one.name: one for one in scripted_extractor.statistics}


# -- the two conventions -----------------------------------------------------------------------------------------------


def header(*, count=4, mean_norm=2.5, mean_squared_norm=9.0):
    columns = (Column(name=HOOKPOINT, dtype=Dtype.FLOAT32, width=16),)
    one = ColumnStatistics(
        name=HOOKPOINT, count=count, mean=(), m2=(), mean_norm=mean_norm, mean_squared_norm=mean_squared_norm
    )
    return StreamHeader(set_id="s", columns=columns, first_row=0, end_row=4, reader="r", statistics=(one,))


def test_sae_lens_multiplies_by_the_root_of_the_width_over_the_mean_norm():
    assert sae_lens_factor(header(), HOOKPOINT) == pytest.approx(4 / 2.5)


def test_dictionary_learning_divides_by_the_root_of_the_mean_squared_norm():
    assert dictionary_learning_norm(header(), HOOKPOINT) == pytest.approx(3.0)


@pytest.mark.parametrize("missing", [{"count": 0}, {"mean_norm": math.nan}, {"mean_norm": 0.0}])
def test_without_statistics_there_is_no_factor(missing):
    with pytest.raises(FailedPrecondition) as caught:
        sae_lens_factor(header(**missing), HOOKPOINT)

    assert caught.value.reason == "STATISTICS_MISSING"


def test_a_column_that_is_not_read_has_no_factor():
    with pytest.raises(InvalidArgument, match=SECOND):
        dictionary_learning_norm(header(), SECOND)


# -- SAELens -----------------------------------------------------------------------------------------------------------


def sae_of(sae_lens, d_in=8):
    config = sae_lens.TopKTrainingSAEConfig(
        d_in=d_in, d_sae=16, k=4, normalize_activations="expected_average_only_in", device="cpu"
    )
    return sae_lens.TopKTrainingSAE(config)


def config_of(total):
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=total,
        train_batch_size_samples=BATCH,
        lr_end=3e-5,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=7,
    )


def test_an_sae_trainer_with_known_scaling_draws_no_batch_too_many(sae_lens, one_thread, client, statistics):
    from sae_lens.training.sae_trainer import SAETrainer

    with for_sae_lens.data_provider(client, EXTRACTION_ID, batch_size=BATCH) as provider:
        trainer = SAETrainer(config_of(500), sae_of(sae_lens), provider)
        for_sae_lens.set_scaling(trainer, provider)
        factor = trainer.activation_scaler.scaling_factor
        trainer.fit()

        assert provider.next_row == 500
    assert factor == pytest.approx(8**0.5 / statistics[HOOKPOINT].mean_norm)
    assert trainer.activation_scaler.scaling_factor is None  # Folded into the weights.


def test_without_it_sae_lens_draws_its_estimate_from_the_stream(sae_lens, one_thread, client, statistics):
    from sae_lens.training.sae_trainer import SAETrainer

    with for_sae_lens.data_provider(client, EXTRACTION_ID, batch_size=BATCH) as provider:
        SAETrainer(config_of(500), sae_of(sae_lens), provider).fit()

        assert provider.next_row == 500 + 7 * BATCH


def test_the_known_factor_is_the_one_that_sae_lens_estimates_from_all_rows(sae_lens, client, statistics):
    from sae_lens.training.activation_scaler import ActivationScaler

    estimated = ActivationScaler()
    with for_sae_lens.data_provider(client, EXTRACTION_ID, batch_size=BATCH) as provider:
        known = sae_lens_factor(provider.header, HOOKPOINT)
        estimated.estimate_scaling_factor(8, provider, 1000 // BATCH)

    assert known == pytest.approx(estimated.scaling_factor, rel=1e-6)


def test_a_multi_sae_trainer_gets_the_same_rows_of_each_hookpoint(sae_lens, one_thread, client, statistics):
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    names = {"late": HOOKPOINT, "early": SECOND}
    provider = for_sae_lens.multi_data_provider(client, EXTRACTION_ID, list(names.values()), batch_size=BATCH)
    with provider:
        first = next(provider)
        assert torch.equal(first[SECOND], first[HOOKPOINT] + 0.5)
        trainer = MultiSAETrainer(config_of(500), {name: sae_of(sae_lens) for name in names}, names, provider)
        for_sae_lens.set_scaling(trainer, provider)
        factors = {name: one.activation_scaler.scaling_factor for name, one in trainer.trainers.items()}
        trainer.fit()

        assert provider.stream.next_row == BATCH + 500
    for name, hookpoint in names.items():
        assert factors[name] == pytest.approx(8**0.5 / statistics[hookpoint].mean_norm)


def test_one_hookpoint_comes_as_a_dict_too(client):
    with for_sae_lens.multi_data_provider(client, EXTRACTION_ID, batch_size=BATCH) as provider:
        assert {name: tuple(rows.shape) for name, rows in next(provider).items()} == {HOOKPOINT: (BATCH, 8)}


def test_a_factor_of_a_checkpoint_is_kept(sae_lens, client, statistics):
    from sae_lens.training.sae_trainer import SAETrainer

    with for_sae_lens.data_provider(client, EXTRACTION_ID, batch_size=BATCH) as provider:
        trainer = SAETrainer(config_of(500), sae_of(sae_lens), provider)
        trainer.activation_scaler.scaling_factor = 0.25
        for_sae_lens.set_scaling(trainer, provider)

    assert trainer.activation_scaler.scaling_factor == 0.25


# -- dictionary_learning -----------------------------------------------------------------------------------------------


@pytest.fixture
def training(monkeypatch):
    """The real library; packages that only its own buffers and plots import may be missing."""
    if importlib.util.find_spec("dictionary_learning") is None:
        pytest.skip("dictionary_learning is not installed")
    for name, needed in {"nnsight": "LanguageModel", "zstandard": "", "umap": "", "circuitsvis": ""}.items():
        if importlib.util.find_spec(name) is None:
            stand_in = types.ModuleType(name)
            setattr(stand_in, needed or "nothing", object)
            monkeypatch.setitem(sys.modules, name, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("dictionary_learning.training")


def trainer_config(steps):
    from dictionary_learning.trainers.standard import StandardTrainer

    return {
        "trainer": StandardTrainer,
        "steps": steps,
        "activation_dim": 8,
        "dict_size": 16,
        "layer": 1,
        "lm_name": "tiny",
        "warmup_steps": 0,
        "sparsity_warmup_steps": None,
        "device": "cpu",
        "seed": 0,
    }


def test_train_sae_takes_its_norm_from_the_statistics(training, one_thread, client, statistics, tmp_path):
    with (
        for_dictionary_learning.buffer(client, EXTRACTION_ID, batch_size=BATCH) as data,
        for_dictionary_learning.known_norm(data) as norm,
    ):
        training.trainSAE(
            data, [trainer_config(9)], 9, save_dir=str(tmp_path), normalize_activations=True, device="cpu"
        )

        assert data.next_row == 10 * BATCH  # It looks at one batch more than it takes.
    saved = json.loads((tmp_path / "trainer_0" / "config.json").read_text())
    assert norm == pytest.approx(math.sqrt(statistics[HOOKPOINT].mean_squared_norm))
    assert saved["buffer"]["set_id"] == "set-1"
    assert (tmp_path / "trainer_0" / "ae.pt").exists()
    assert training.get_norm_factor.__module__ == "dictionary_learning.training"


def test_its_own_estimate_is_the_known_norm(training, one_thread, client, statistics):
    with for_dictionary_learning.buffer(client, EXTRACTION_ID, batch_size=BATCH) as data:
        known = dictionary_learning_norm(data.header, HOOKPOINT)
        estimated = training.get_norm_factor(data, steps=1000 // BATCH - 1)

    assert known == pytest.approx(estimated, rel=1e-5)


# -- sparsify ----------------------------------------------------------------------------------------------------------


def test_a_replay_calls_its_modules_with_the_recorded_rows(client, scripted_extractor):
    model, dataset = for_sparsify.replay(client, EXTRACTION_ID, context_size=30)
    seen = []
    model.base_model.get_submodule("layers.1").register_forward_hook(lambda _module, _inputs, out: seen.append(out))

    for items in (range(16), range(16, 32), range(32, 33)):
        model(torch.stack([dataset[item]["input_ids"] for item in items]))
    model.close()

    assert len(dataset) == 1000 // 30
    assert [tuple(rows.shape) for rows in seen] == [(16, 30, 8), (16, 30, 8), (1, 30, 8)]
    rows = torch.cat([rows.flatten(0, 1) for rows in seen])
    assert np.array_equal(rows.numpy(), scripted_extractor.column(HOOKPOINT)[: 33 * 30])


def test_a_replay_goes_on_where_its_dataset_does(client, scripted_extractor):
    model, dataset = for_sparsify.replay(client, EXTRACTION_ID, context_size=30)
    seen = []
    model.layers[1].register_forward_hook(lambda _module, _inputs, out: seen.append(out))

    rest = dataset.select(range(20, 33))
    model(torch.stack([rest[item]["input_ids"] for item in range(4)]))
    model.close()

    assert np.array_equal(seen[0].flatten(0, 1).numpy(), scripted_extractor.column(HOOKPOINT)[600:720])


def test_other_tokens_than_those_due_are_an_error(client):
    model, dataset = for_sparsify.replay(client, EXTRACTION_ID, context_size=30)

    with pytest.raises(DataLoss, match="out of step"):
        model(dataset[1]["input_ids"][None])
    model.close()


def test_what_a_replay_can_not_give_is_refused(client):
    model, dataset = for_sparsify.replay(client, EXTRACTION_ID, context_size=30)

    with pytest.raises(InvalidArgument, match="fvu"):
        model(dataset[0]["input_ids"][None], labels=dataset[0]["input_ids"][None])
    with pytest.raises(InvalidArgument, match="hook_resid_pre"):
        for_sparsify.replay(client, EXTRACTION_ID, [SECOND])
    with pytest.raises(InvalidArgument, match="context_size"):
        for_sparsify.replay(client, EXTRACTION_ID, context_size=2000)
    with pytest.raises(InvalidArgument, match="fvu"):
        _ = model(dataset[0]["input_ids"][None]).logits
    model.close()


def test_sparsify_trains_on_a_replay(one_thread, client, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify = pytest.importorskip("sparsify")
    monkeypatch.chdir(tmp_path)
    model, dataset = for_sparsify.replay(client, EXTRACTION_ID, context_size=30)
    config = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=16, k=4),
        batch_size=4,
        hookpoints=["layers.1"],
        log_to_wandb=False,
        run_name="replayed",
        grad_acc_steps=1,
        optimizer="signum",
    )

    trainer = sparsify.Trainer(config, dataset, model)
    trainer.fit()
    model.close()

    assert trainer.global_step == math.ceil(len(dataset) / 4)
    assert trainer.saes["layers.1"].encoder.in_features == 8
    assert list(islice(tmp_path.rglob("sae.safetensors"), 1))
