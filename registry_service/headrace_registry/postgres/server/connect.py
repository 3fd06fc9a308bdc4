"""The first contact with the database: waits a little for it to start, then migrates."""

from __future__ import annotations

import psycopg
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from headrace_chassis.errors import StartError
from headrace_registry.postgres.server.migrations import migrate, packaged_migrations
from headrace_registry.postgres.server.recipe import ConnectionRecipe

# Compose files and systemd units start the database at the same time as the registry.
_PATIENCE_S = 30.0


class DatabaseUnreachable(StartError):
    """The database does not answer, or refuses the connection."""


async def migrate_when_reachable(url: str, *, patience_s: float = _PATIENCE_S) -> None:
    """Applies the migrations. Raises DatabaseUnreachable after `patience_s`, other StartErrors at once."""
    recipe = ConnectionRecipe.of(url)
    attempts = AsyncRetrying(
        retry=retry_if_exception_type(psycopg.OperationalError),
        stop=stop_after_delay(patience_s),
        wait=wait_fixed(0.5),
        reraise=True,
    )
    try:
        async for attempt in attempts:
            with attempt:
                await migrate(url, packaged_migrations())
    except psycopg.Error as exc:
        cause = recipe.without_secrets(str(exc).strip())
        raise DatabaseUnreachable(f"The database can't be used ({cause}); check DATABASE_URL.") from None
