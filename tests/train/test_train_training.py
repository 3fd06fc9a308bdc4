"""SAELens' trainer learns planted features from the provider, and the saved SAE loads unchanged."""

import itertools

import pytest
import torch

from fix_train import D_IN, N_PLANTED, blocks_of, planted_rows
from headrace_client.errors import InvalidArgument
from headrace_client.values import Recipe
from headrace_train.arguments import ARCHITECTURES, parse
from headrace_train.rows.blocks import RowFilter
from headrace_train.rows.provider import MixingProvider
from headrace_train.training.evaluation import HeldOut, evaluate, held_out_rows

N_ROWS = 4000


def arguments(*flags):
    small = ["--batch-size", "256", "--k", "3", "--d-sae", "48", "--rows", "30000", "--lr", "0.01"]
    return parse(["--extraction", "x", "--out", "o", *small, *flags])


def new_trainer(training, wanted, on_step=lambda *_: None):
    row_filter = RowFilter(Recipe(), drop_bos=False, max_norm_multiple=10)
    provider = MixingProvider(
        blocks_of(planted_rows(N_ROWS), epochs=None),
        row_filter,
        n_rows=N_ROWS,
        batch_size=wanted.batch_size,
        buffer_rows=2000,
        seed=wanted.seed,
    )
    about = {"model_name": "m", "hook_name": "h"}
    return training.new_trainer(wanted, provider, metadata=about, device="cpu", on_step=on_step), provider


@pytest.fixture
def held_out():
    return planted_rows(N_ROWS + 500)[N_ROWS:]


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_planted_features_are_learned(training, held_out, normalize):
    trainer, provider = new_trainer(training, arguments("--normalize", normalize))
    before = evaluate(trainer.sae, held_out, scale=trainer.scale)

    trained = training.fit(trainer, provider)

    after = evaluate(trained.sae, held_out)
    assert before.explained_variance < 0.5
    assert after.explained_variance > 0.9
    assert after.l0 <= 3
    assert (trained.n_rows, trained.n_steps) == (118 * 256, 118)
    assert (trained.scale != 1) == (normalize != "none")


def test_explained_variance_is_that_of_the_formula(training, held_out):
    trainer, _ = new_trainer(training, arguments())
    sae = trainer.sae
    with torch.no_grad():
        output = sae.decode(sae.encode(held_out * trainer.scale)) / trainer.scale
    expected = 1 - (held_out - output).square().sum() / (held_out - held_out.mean(0)).square().sum()

    assert evaluate(sae, held_out, scale=trainer.scale).explained_variance == pytest.approx(expected.item(), abs=1e-5)
    assert sae.training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_from_disk_with_the_same_features(
    training, sae_lens, held_out, tmp_path, architecture
):
    trainer, provider = new_trainer(training, arguments("--architecture", architecture, "--rows", "15000"))
    trained = training.fit(trainer, provider)

    trained.sae.save_inference_model(tmp_path / "sae")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "sae")

    trained.sae.eval()
    with torch.no_grad():
        ours, theirs = (sae.decode(sae.encode(held_out)) for sae in (trained.sae, loaded))
    if architecture == "batchtopk":  # At inference a threshold replaces the top k of the batch.
        assert evaluate(loaded, held_out).l0 == pytest.approx(3, rel=0.3)
    else:
        assert torch.allclose(ours, theirs, atol=1e-3)
    assert loaded.cfg.metadata.hook_name == "h"
    assert loaded.cfg.normalize_activations == "none"


def test_topk_features_on_disk_are_those_of_the_trainer(training, sae_lens, held_out, tmp_path):
    trainer, provider = new_trainer(training, arguments("--rows", "5000"))
    sae = training.fit(trainer, provider).sae
    sae.save_inference_model(tmp_path / "sae")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "sae")

    with torch.no_grad():
        assert torch.allclose(sae.encode(held_out), loaded.encode(held_out), atol=1e-4)


def test_the_same_seed_trains_the_same_sae(training):
    def weights(seed):
        trainer, provider = new_trainer(training, arguments("--rows", "2000", "--seed", seed))
        return training.fit(trainer, provider).sae.W_dec

    assert torch.equal(weights("1"), weights("1"))
    assert not torch.equal(weights("1"), weights("2"))


def test_ctrl_c_ends_the_training_with_the_sae_as_it_is(training, held_out):
    def on_step(trainer, _output):
        if trainer.n_training_steps == 40:
            raise KeyboardInterrupt

    trainer, provider = new_trainer(training, arguments(), on_step)

    trained = training.fit(trainer, provider)

    assert trained.interrupted
    assert trained.n_steps == 40
    assert (
        trainer.activation_scaler.scaling_factor is None
    )  # The scaling is folded in, as at the end of a whole training.
    assert evaluate(trained.sae, held_out).explained_variance > 0.5


def test_ctrl_c_before_the_first_step_goes_on_to_the_caller(training):
    def on_step(_trainer, _output):
        raise KeyboardInterrupt

    trainer, provider = new_trainer(training, arguments(), on_step)

    with pytest.raises(KeyboardInterrupt):
        training.fit(trainer, provider)


def test_more_active_features_than_there_are_is_refused(training):
    with pytest.raises(InvalidArgument, match="smaller --k") as raised:
        training.d_sae_of(arguments("--k", "49"), D_IN)
    assert raised.value.fields == {"k": "at most 48"}


def test_a_device_that_is_not_there_is_refused(training):
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for wanted in (missing, "abacus"):
        with pytest.raises(InvalidArgument, match="can't be used"):
            training.choose_device(wanted)
    assert training.choose_device("cpu") == "cpu"


def test_held_out_rows_are_read_once_and_not_before_they_exist():
    opened = itertools.count()

    def open_blocks():
        next(opened)
        return blocks_of(planted_rows(100))

    row_filter = RowFilter(Recipe(), drop_bos=False, max_norm_multiple=0)
    held_out = HeldOut(open_blocks, row_filter, n_rows=1000, n_held_out=100)

    assert held_out.rows(999) is None
    assert len(held_out.rows(1000)) == 100
    assert held_out.rows() is held_out.rows(0)
    assert len(held_out.sample(1000)) == 100
    assert next(opened) == 1


def test_a_sample_of_held_out_rows_is_spread_over_all_of_them():
    row_filter = RowFilter(Recipe(), drop_bos=False, max_norm_multiple=0)
    acts = torch.arange(5000.0)[:, None]
    held_out = HeldOut(lambda: blocks_of(acts), row_filter, n_rows=5000, n_held_out=5000)

    sample = held_out.sample(5000)

    assert 1024 <= len(sample) <= 2048
    assert sample[-1] > 4990


@pytest.mark.parametrize(("n_rows", "d_in", "expected"), [(2, 8, 1), (100_000, 576, 5000), (10**7, 16_384, 1024)])
def test_few_rows_are_held_out(n_rows, d_in, expected):
    assert held_out_rows(n_rows, d_in) == expected


def test_planted_rows_are_what_the_tests_take_them_for():
    assert planted_rows(10).shape == (10, D_IN)
    assert N_PLANTED < 48
