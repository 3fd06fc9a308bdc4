"""The catalog: curated models and their estimated memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from headrace_registry.errors import FieldInvalid
from headrace_registry.models.models import Architecture, Quantization
from headrace_registry.paging import Page
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.advice import max_batch_size
from headrace_registry.sizing.catalog_table import ROWS, Row
from headrace_registry.sizing.estimate import FORMS, Profile, estimate
from headrace_registry.sizing.shapes import Shapes, shapes_of
from headrace_registry.sizing.tensors import Form
from headrace_registry.sizing.workload import Workload

CATEGORIES = ("tiny", "interpretability", "coding", "general", "instruct")
# Memory of the accelerators in use, from consumer GPUs to an H200.
MEMORY_SIZES = tuple(gigabytes * 10**9 for gigabytes in (8, 12, 16, 24, 40, 80, 141))
_WORKLOAD = Workload(batch_size=1, context_size=1024, n_hookpoints=1)
# Forms for an accelerator, the most exact first; the entry names the first form that leaves memory for a batch.
_BATCH_FORMS = tuple(form for form in FORMS if form.dtype == "bfloat16")
# Parameters of the vision tower of the larger Gemma 3 models; its projector adds 1152 for each unit of width.
_GEMMA3_TOWER = 416_866_032 + 1152


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a model at rest in one form, with its runner."""

    form: Form
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The largest batch in a memory size, and the quantization it needs."""

    memory_bytes: int
    batch_size: int
    quantization: Quantization


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One curated model."""

    name: str
    repo_id: str
    network: Architecture
    categories: tuple[str, ...]
    gated: bool
    d_embed: int = 0  # Width of the embeddings, if it is not that of the residual stream.

    @classmethod
    def of(cls, row: Row) -> Entry:
        """Returns the entry of a row of the table."""
        name, repo_id, model_type, layers, d_model, heads, kv_heads, d_head, d_mlp, vocab, window, flags, categories = (
            row
        )
        return cls(
            name=name,
            repo_id=repo_id,
            network=Architecture(
                model_type=model_type,
                n_layers=layers,
                d_model=d_model,
                n_heads=heads,
                n_kv_heads=kv_heads,
                d_head=d_head,
                d_mlp=d_mlp,
                vocab_size=vocab,
                context_window=window,
                tied_embeddings="T" in flags,
            ),
            categories=tuple(categories.split()),
            gated="G" in flags,
            d_embed=int(flags.partition("E")[2] or 0),
        )

    @cached_property
    def shapes(self) -> Shapes:
        """The tensors of its network."""
        shapes = shapes_of(self.network, self.d_embed)
        assert shapes is not None, self.name
        return shapes

    @property
    def n_parameters(self) -> int:
        """Exact number of parameters, with head and vision tower; tied weights count once."""
        return self.shapes.n_parameters + self._n_other

    @property
    def probe_layers(self) -> tuple[int, ...]:
        """An early, a middle and a late layer: a quarter, half and three quarters of the depth."""
        return tuple(sorted({self.network.n_layers * quarter // 4 for quarter in (1, 2, 3)}))

    @cached_property
    def profile(self) -> Profile:
        """Facts for the estimator, computed from the family's shapes."""
        return Profile(network=self.network, tally=self.shapes.tally(self._n_other), exact=False, stored_dtype="BF16")

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        """Its memory on an accelerator in each form."""
        return tuple(
            Memory(form=form, total_bytes=estimate(self.profile, form, kind=DeviceKind.CUDA).total_bytes)
            for form in FORMS
        )

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Batches by memory size, without the sizes that are too small for every form."""
        found = []
        for memory_bytes in MEMORY_SIZES:
            for form in _BATCH_FORMS:
                rest = memory_bytes - estimate(self.profile, form, kind=DeviceKind.CUDA).total_bytes
                size = max_batch_size(self.profile, form, _WORKLOAD, kind=DeviceKind.CUDA, free_bytes=rest)
                if size:
                    found.append(Batch(memory_bytes=memory_bytes, batch_size=size, quantization=form.quantization))
                    break
        return tuple(found)

    @property
    def smallest_bytes(self) -> int:
        """Bytes of its smallest form."""
        return min(memory.total_bytes for memory in self.memory)

    @property
    def _n_other(self) -> int:
        return _GEMMA3_TOWER + 1152 * self.network.d_model if self.network.model_type == "gemma3" else 0


class Catalog:
    """Entries in the order of the table; names and repos are unique."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        self._by_repo = {entry.repo_id.lower(): entry for entry in self.entries}
        self._by_name = {entry.name: number for number, entry in enumerate(self.entries)}
        assert len(self._by_repo) == len(self._by_name) == len(self.entries)

    def of_repo(self, repo_id: str) -> Entry | None:
        """Finds a model by its repo."""
        return self._by_repo.get(repo_id.lower())

    def page(self, *, fits_bytes: int, category: str, page: Page) -> tuple[Sequence[Entry], str]:
        """One page and the token of the next. Raises FieldInvalid for an unknown category."""
        if category and category not in CATEGORIES:
            raise FieldInvalid("category", f"{category[:80]!r} is none of {', '.join(CATEGORIES)}")
        start = 0
        if page.after is not None:
            if page.after[0] not in self._by_name:
                raise FieldInvalid("page_token", "is of another version's catalog; start again with an empty one")
            start = self._by_name[page.after[0]] + 1
        found = self.matching(start, fits_bytes=fits_bytes, category=category)
        shown = found[: page.size]
        return shown, page.token_after((shown[-1].name,)) if len(found) > page.size else ""

    def matching(self, start: int = 0, *, fits_bytes: int, category: str) -> Sequence[Entry]:
        """The entries from a place on that are of a category and have a form that fits; without these, all."""
        return [
            entry
            for entry in self.entries[start:]
            if (not category or category in entry.categories) and (not fits_bytes or entry.smallest_bytes <= fits_bytes)
        ]


CATALOG = Catalog(Entry.of(row) for row in ROWS)
