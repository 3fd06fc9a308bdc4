"""The server that the registry is compared with: `python -m bench.registry_servers --database-url URL`.

One unary method that runs one transaction of two statements, through the registry's own pool and on its own Postgres.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import grpc

from bench.processes import announce
from headrace_registry.postgres.server.pool import Connection, Database

METHOD = "/bench.Touch/Touch"
_TABLE = "CREATE TABLE IF NOT EXISTS bench_touches (id bigint GENERATED ALWAYS AS IDENTITY, model_id text NOT NULL)"
_READ = "SELECT id, state FROM models WHERE id = %(model_id)s"
_WRITE = "INSERT INTO bench_touches (model_id) VALUES (%(model_id)s)"


async def serve(database_url: str, ready_file: Path) -> None:
    """Serves until the process is killed."""
    database = Database(database_url)
    await database.open()

    async def make(conn: Connection) -> None:
        await conn.execute(_TABLE)

    await database.run(make)

    async def touch(request: bytes, context: Any) -> bytes:
        del context

        async def work(conn: Connection) -> None:
            await (await conn.execute(_READ, {"model_id": request.decode()})).fetchone()
            await conn.execute(_WRITE, {"model_id": request.decode()})

        await database.run(work)
        return b""

    server = grpc.aio.server()
    service, method = METHOD[1:].split("/")
    handlers: dict[str, Any] = {method: grpc.unary_unary_rpc_method_handler(touch)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(ready_file, f"127.0.0.1:{port}")
    await server.wait_for_termination()


def main() -> None:
    """Runs the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    args = parser.parse_args()
    asyncio.run(serve(args.database_url, args.ready_file))


if __name__ == "__main__":
    main()
