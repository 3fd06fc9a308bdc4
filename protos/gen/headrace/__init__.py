"""The Python client under the project's own name, beside the generated stubs `headrace.*.v1`.

`headrace.connect("127.0.0.1:7470")` is `HeadraceClient.connect`. Importing `headrace` imports neither gRPC nor torch:
the client is loaded at the first use of `connect` or `HeadraceClient`, so code that only needs a stub stays light.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace_client import HeadraceClient

    connect = HeadraceClient.connect
    __version__: str

__all__ = ["HeadraceClient", "__version__", "connect"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return importlib.metadata.version("headrace")
    # By name, because this package lies below the client and may not depend on it.
    client = importlib.import_module("headrace_client").HeadraceClient
    return client if name == "HeadraceClient" else client.connect


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
