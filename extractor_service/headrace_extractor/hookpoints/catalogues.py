"""The catalogues of a node's models. Their files are parsed under confinement, once for each version of a file."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Confinement, Refuse, Talk
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.hookpoints.catalogue import Catalogue, Hookpoint, catalogue_of, network_of
from headrace_extractor.hookpoints.weight_shapes import Shape, WeightShapes, module_shape
from headrace_extractor.models import ModelInfo
from headrace_models.config import Network

_MAX_KEPT = 256
_AT_ONCE = 4
_MIB = 1024 * 1024
# A config is parsed here once more, from the child's answer.
_CONFIG = Limits(memory_bytes=256 * _MIB, cpu_s=4, wall_s=20.0, output_bytes=2 * _MIB)
_HEADERS = Limits(memory_bytes=512 * _MIB, cpu_s=10, wall_s=40.0, output_bytes=_MIB)


class Catalogues:
    """Catalogues by model. Raises ModelUnsupported for a model whose config or headers can't be read."""

    def __init__(self, confinement: Confinement) -> None:
        self._confinement = confinement
        self._kept: dict[str, tuple[tuple[int, ...], Catalogue]] = {}
        # Threads of their own: they wait for children, and heartbeats need the default ones.
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="catalogues")

    async def of(self, model: ModelInfo) -> Catalogue:
        """Returns the catalogue of a model; it can't resolve names of modules that are no site."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._of, model)

    async def resolve(self, model: ModelInfo, names: Iterable[str]) -> tuple[Hookpoint, ...]:
        """Does the same as `Catalogue.resolve`, also for names of modules."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, model, tuple(names))

    def _of(self, model: ModelInfo) -> Catalogue:
        try:
            found = (Path(model.files_path) / "config.json").stat()
            stamp: tuple[int, ...] = (found.st_ino, found.st_size, found.st_mtime_ns)
        except (OSError, ValueError):
            stamp = ()
        kept_stamp, catalogue = self._kept.get(model.files_path, (None, None))
        if catalogue is not None and stamp and kept_stamp == stamp:
            return catalogue
        told = self._confinement.run(tell_network, {"model": asdict(model)}, refuse=_unreadable(model), limits=_CONFIG)
        catalogue = Catalogue(Network(**told))
        self._kept.pop(model.files_path, None)
        self._kept[model.files_path] = (stamp, catalogue)
        while len(self._kept) > _MAX_KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        return catalogue

    def _resolve(self, model: ModelInfo, names: tuple[str, ...]) -> tuple[Hookpoint, ...]:
        catalogue = self._of(model)
        talk: Talk | None = None
        with ExitStack() as stack:

            def shape_of(path: str, side: str) -> Shape | str:
                nonlocal talk
                if talk is None:
                    opened = self._confinement.open(
                        tell_shapes, {"model": asdict(model)}, refuse=_unreadable(model), limits=_HEADERS
                    )
                    talk = stack.enter_context(opened)
                told = talk.ask([path, side])
                return told if isinstance(told, str) else tuple(told)

            return catalogue.with_shapes(shape_of).resolve(names)


def tell_network(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the network of a model as JSON, after its catalogue was made of it once."""
    info = ModelInfo(**model)
    try:
        catalogue = catalogue_of(info)
        assert catalogue.offered is not None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as exc:
        raise ModelUnsupported(
            f"config.json of {info.id} has a setting that its architecture can't have ({exc}); mend the config and"
            " prepare the model again."
        ) from exc
    return asdict(catalogue.network)


def tell_shapes(model: dict[str, Any]) -> Generator[Any, Any, None]:
    """Answers each `[path, side]` with the shape of the module's rows, or with the reason why it can't be told."""
    info = ModelInfo(**model)
    network, weights = network_of(info), WeightShapes.of_folder(info.files_path)
    question = yield None
    while True:
        path, side = question
        question = yield module_shape(path, side, network, weights)


def _unreadable(model: ModelInfo) -> Refuse:
    return lambda why: ModelUnsupported(
        f"The config or a header of model {model.id} {why}; mend the files and prepare the model again."
    )
