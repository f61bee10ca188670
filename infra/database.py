"""PostgreSQL behind both servers: one database, a schema for each."""

from __future__ import annotations

from urllib.parse import quote, urlsplit, urlunsplit

from tasks.errors import InputError

SCHEMAS = ("mlflow", "mlflow_auth", "prefect")


def checked(url: str) -> str:
    """The address, when it is PostgreSQL's; its driver is ours to choose."""
    parts = urlsplit(url)
    if parts.scheme.split("+")[0] not in ("postgresql", "postgres") or not parts.path.strip("/"):
        raise InputError("DATABASE_URL is not postgresql://USER:PASSWORD@HOST:PORT/NAME (or the word sqlite)")
    return urlunsplit(parts._replace(scheme="postgresql"))


def sqlalchemy_url(url: str, schema: str) -> str:
    """The address for SQLAlchemy and psycopg, with everything in one schema."""
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, f"options={quote(f'-csearch_path={schema}')}"]))
    return urlunsplit(parts._replace(scheme="postgresql+psycopg", query=query))


def asyncpg_url(url: str) -> str:
    """The address for Prefect; its schema is a setting of its own."""
    return urlunsplit(urlsplit(url)._replace(scheme="postgresql+asyncpg"))


def prepare(url: str) -> str:
    """Make what is missing: schemas, and the extension that Prefect uses. Returns Prefect's search path."""
    import psycopg

    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            for schema in SCHEMAS:
                connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm SCHEMA prefect")
            place = connection.execute(
                "SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace "
                "WHERE extname = 'pg_trgm'"
            ).fetchone()
    except psycopg.Error as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"DATABASE_URL: PostgreSQL does not let us in or set up: {reason}") from error
    return "prefect" if place is None or place[0] == "prefect" else f"prefect,{place[0]}"
