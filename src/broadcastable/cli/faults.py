"""What an error of Redis or of the database means to a person, in one line that says what to do."""

from __future__ import annotations

from redis import RedisError
from sqlalchemy.exc import DBAPIError

OF_SERVICES = (RedisError, DBAPIError)
"""The errors that `service_fault` knows."""


def service_fault(error: RedisError | DBAPIError) -> str:
    """*error*, without the statement and its parameters, and what to do."""
    if isinstance(error, DBAPIError):
        return (
            f"The database: {first_line(error.orig)}. Is database_url (BROADCASTABLE_DATABASE_URL) right, and have the "
            "migrations run? Write the outbox tables' one: broadcastable install"
        )
    return f"Redis: {first_line(error)}. Is it running, and is redis_url (BROADCASTABLE_REDIS_URL) right?"


def first_line(error: BaseException | None) -> str:
    """The first line of what *error* says; drivers and SQLAlchemy add the statement, hints and links in others."""
    return str(error).strip().partition("\n")[0].rstrip(". ")
