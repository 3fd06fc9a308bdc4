"""Lists and values as people read them, the environment that `connect` reads, bars, and packages that are missing."""

import json
import sys

import pytest

from fix_absent import run_without
from fix_scripted_extractor import EXTRACTION_ID
from headrace.registry.v1 import residency_pb2
from headrace_client import HeadraceClient, Listing, errors, values
from headrace_client.extras import needing
from headrace_client.progress import Measure, of_extraction, of_model, told


@pytest.fixture
def many(client):
    for number in range(7):
        client.models.register(hub="a/b", id=f"m{number}", labels={"note": "<b>&"})
    return client


def test_lists_are_lists_that_say_little_of_each_value(many):
    models = many.models.list()

    assert isinstance(models, list)
    assert len(models) == 7
    assert repr(models).startswith("[Model(id='m0', state='REGISTERED', quantization='none'")
    assert repr(models).endswith("… 2 more]")
    assert len(repr(models)) < 600
    assert repr(models[:1] + models[1:2]).count("Model(") == 2


def test_a_notebook_shows_a_table_with_texts_escaped(many):
    models = many.models.list()

    table, whole = models._repr_html_(), models[0]._repr_html_()

    assert table.count("<tr>") == 8
    assert "<th>id</th><th>state</th>" in table
    assert "<td>m6</td><td>REGISTERED</td>" in table
    assert "&lt;b&gt;&amp;" in whole
    assert "<b>" not in whole
    assert "<code>[]</code>" in Listing()._repr_html_()


@pytest.mark.parametrize(
    "read",
    [
        lambda c: c.models.list(),
        lambda c: c.models.catalog(),
        lambda c: c.models.attempts("m0"),
        lambda c: c.models.load_options(),
        lambda c: c.corpora.list(),
        lambda c: c.extractions.list(),
        lambda c: c.residencies.list(),
        lambda c: c.residencies.unload("m0"),
        lambda c: c.pins.list(),
        lambda c: c.sets.list(),
        lambda c: c.sets.get("set-1"),
        lambda c: c.nodes(),
        lambda c: c.hookpoints("m0"),
    ],
)
def test_every_list_of_the_client_is_one(many, read):
    assert isinstance(read(many), Listing)


def test_values_in_lists_say_little_of_themselves():
    kinds = [kind for kind in vars(values).values() if isinstance(kind, type) and hasattr(kind, "SHOWN")]

    assert {"Model", "Extraction", "ActivationSet", "Residency", "Node", "Corpus"} <= {kind.__name__ for kind in kinds}
    for kind in kinds:
        assert kind.SHOWN, kind
        assert set(kind.SHOWN) <= set(kind.__dataclass_fields__), kind


def test_connect_reads_the_environment(registry_host, scripted_registry, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_REGISTRY", registry_host.address)
    monkeypatch.setenv("HEADRACE_TOKEN", "from-env")
    with HeadraceClient.connect() as client:
        client.models.list()
    with HeadraceClient.connect(token="given") as client:
        client.models.list()
    monkeypatch.setenv("HEADRACE_CA_FILE", str(tmp_path / "absent.pem"))

    seen = [one["authorization"] for one in scripted_registry.metadata["ListModels"]]
    assert seen == ["Bearer from-env", "Bearer given"]
    with pytest.raises(errors.InvalidArgument, match="certificate"):
        HeadraceClient.connect()


class Drawn:
    """A bar that keeps what it is shown."""

    def __init__(self, title):
        self.title, self.shown, self.closed = title, [], False

    def show(self, now):
        self.shown.append(now)

    def close(self):
        self.closed = True


def test_a_wait_draws_its_progress_and_closes_the_bar(client, scripted_extractor):
    bars = []

    def open_bar(title):
        bars.append(Drawn(title))
        return bars[0]

    seen = []
    with told(EXTRACTION_ID, seen.append, progress=True, measure=of_extraction, open_bar=open_bar) as tell:
        client.extractions.wait(EXTRACTION_ID, tell)

    assert bars[0].title == EXTRACTION_ID
    assert bars[0].shown[0] == Measure(phase="running", done=0, total=1000, unit="rows")
    assert bars[0].shown[-1] == Measure(phase="done", done=1000, total=1000, unit="rows")
    assert bars[0].closed
    assert len(seen) == 6


def test_a_model_s_bar_counts_bytes(client, scripted_registry):
    client.models.register(hub="a/b", id="tiny")
    measures = []
    client.models.wait_ready("tiny", lambda model: measures.append(of_model(model)))

    assert [one.phase for one in measures] == ["downloading", "downloading", "ready"]
    assert (measures[1].done, measures[1].total, measures[1].unit) == (1, 3, "B")
    assert measures[-1].done == measures[-1].total


def test_the_bar_is_rich_s_and_goes_to_standard_error(client, capsys):
    assert client.extractions.wait(EXTRACTION_ID, progress=True).state == "DONE"

    printed = capsys.readouterr()
    assert EXTRACTION_ID in printed.err
    assert "100%" in printed.err
    assert printed.out == ""


def test_a_residency_is_waited_for(client, scripted_registry):
    loading = client.residencies.load("tiny")
    resident = residency_pb2.Residency(
        id=loading.id, model_id="tiny", node_id="n1", device_id="cpu", state=residency_pb2.RESIDENCY_STATE_RESIDENT
    )
    scripted_registry.residencies = [resident]
    states = []

    assert client.residencies.wait(loading, lambda one: states.append(one.state.value)).state == "RESIDENT"
    assert states == ["LOADING", "RESIDENT"]


WITHOUT_TORCH = """
import json, sys
from headrace_client import HeadraceClient, errors
found = []
for use in (
    lambda: HeadraceClient.connect("127.0.0.1:1").activations(None),
    lambda: __import__("headrace_client").ActivationStream,
    lambda: __import__("headrace_client.integrations.sae_lens"),
):
    try:
        use()
    except errors.PackageMissing as exc:
        assert isinstance(exc, ImportError)
        found.append(str(exc))
print(json.dumps(found))
"""


def test_without_torch_the_error_names_the_extra():
    done = run_without("torch", WITHOUT_TORCH)

    assert done.stderr == ""
    assert (
        json.loads(done.stdout) == ["PACKAGE_MISSING: torch is not installed; run: pip install 'headrace[torch]'"] * 3
    )


def test_a_missing_part_of_ours_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError) as caught, needing("headrace[torch]"):
        import headrace_client.nothing  # noqa: F401, PLC0415

    assert not isinstance(caught.value, errors.HeadraceError)


def test_without_rich_and_tqdm_a_bar_names_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("rich", "tqdm")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("rich", "tqdm", "tqdm.auto", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)

    with (
        pytest.raises(errors.PackageMissing, match=r"headrace\[progress\]"),
        told("x", None, progress=True, measure=of_extraction),
    ):
        raise AssertionError("not reached")
