"""A set of rows with planted features, served by a scripted extractor, and SAELens imported without its warnings."""

# ruff: noqa: PLC0415 -- SAELens takes seconds to import, and only some tests need it

import importlib
import warnings

import numpy as np
import pytest
import torch

from fix_scripted_extractor import ScriptedExtractor
from fix_scripted_registry import ScriptedRegistry
from headrace.common.v1 import dtype_pb2
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace.registry.v1 import model_pb2
from headrace_extractor.corpora.packing import Packer, SpecialTokens
from headrace_extractor.corpora.recipe import Recipe as ServerRecipe
from headrace_train.rows.blocks import RowBlock

BOS = 1
CONTEXT_SIZE = 16
BOS_NORM = 1000.0
N_PLANTED = 24
D_IN = 32
N_VOCABULARY = 60


@pytest.fixture(scope="session")
def sae_lens():
    """SAELens; importing it warns of deprecations in TransformerLens, which it imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("sae_lens")


@pytest.fixture
def one_thread():
    """Runs torch on one thread: for small matrices several are slower, above all if other processes use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def training(sae_lens, one_thread):
    from headrace_train.training import trainer

    return trainer


def documents(n_documents, *, seed=0, longest=60):
    """Documents of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, N_VOCABULARY, rng.integers(1, longest)).astype(np.int32) for _ in range(n_documents)]


def packed_rows(texts, **recipe):
    """Provenance of all rows as the extractor lays them out, and a mask of the rows that begin a piece."""
    packer = Packer(
        texts, ServerRecipe(**{"context_size": CONTEXT_SIZE, "bos": "document"} | recipe), SpecialTokens(bos_id=BOS)
    )
    parts = [
        np.stack([b[b_keep] for b in (batch.token_ids, batch.documents, batch.positions, batch.position_ids)])
        for batch in packer.batches()
        for b_keep in [batch.keep]
    ]
    token_id, document, position, within = np.concatenate(parts, axis=1)
    return {"token_id": token_id, "document": document, "position": position}, within == 0


def planted_rows(n_rows, *, seed=0):
    """`[n_rows, D_IN]`: sums of three of `N_PLANTED` directions, on top of an offset, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(N_PLANTED, D_IN, generator=generator), dim=1)
    drawn = torch.rand(n_rows, N_PLANTED, generator=generator)
    active = drawn <= drawn.kthvalue(3, dim=1, keepdim=True).values
    strength = active * (4 + 4 * torch.rand(n_rows, N_PLANTED, generator=generator))
    noise = 0.05 * torch.randn(n_rows, D_IN, generator=generator)
    return strength @ directions + noise + 2.0


def blocks_of(acts, positions=None, *, block_rows=100, epochs=1):
    """RowBlocks over rows in memory; `epochs` None for ever."""
    positions = torch.ones(len(acts), dtype=torch.int32) if positions is None else positions
    done = 0
    while epochs is None or done < epochs:
        for at in range(0, len(acts), block_rows):
            end = min(at + block_rows, len(acts))
            yield RowBlock(first_row=at, acts=acts[at:end].clone(), positions=positions[at:end].clone())
        done += 1


class PlantedExtractor(ScriptedExtractor):
    """Serves `planted_rows` under packed documents; the first position of every piece is an attention sink."""

    def __init__(self, n_documents=140):
        self.provenance, self.sinks = packed_rows(documents(n_documents))
        acts = planted_rows(len(self.sinks))
        acts[torch.from_numpy(self.sinks)] = BOS_NORM / D_IN**0.5
        self.acts = acts
        super().__init__(n_rows=len(acts), d=D_IN)

    def _extraction(self):
        value = super()._extraction()
        value.spec.recipe.CopyFrom(
            ex_pb.Recipe(
                context_size=CONTEXT_SIZE,
                packing=ex_pb.PACKING_PACKED,
                bos=ex_pb.BOS_POLICY_DOCUMENT,
                eos=ex_pb.EOS_POLICY_NONE,
                batch_size=4,
                storage_dtype=dtype_pb2.DTYPE_FLOAT32,
            )
        )
        return value

    def column(self, name):
        return self.provenance[name].astype("<i4") if name in self.provenance else self.acts.numpy()


@pytest.fixture
def planted_host(hosts):
    return hosts(PlantedExtractor())


@pytest.fixture
def planted_registry(hosts, planted_host):
    """A registry that knows the node of `planted_host` and the model."""
    registry = ScriptedRegistry()
    registry.add_node("n1", planted_host.address)
    registry.models["tiny"] = model_pb2.Model(
        id="tiny", commit_sha="c0ffee", state=model_pb2.MODEL_STATE_READY, tokenizer_digest="t"
    )
    return hosts(registry)
