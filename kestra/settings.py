"""Every setting of the data layer, read from the environment when `Settings()` is called, never on import.

No URL means the embedded PostgreSQL (see `kestra.embedded`). An empty variable counts as unset. A `.env` file is not
read: what the process was given is what counts.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Final, Self

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from kestra.errors import ConfigurationError

_PREFIX: Final = "KESTRA_"
_SCHEMES: Final = ("postgresql", "postgres", "postgresql+psycopg")
_MAX_PORT: Final = 65535


def _normalised(url: str) -> str:
    """The libpq form of a database URL. No error quotes a part of it: a malformed URL has its password anywhere."""
    scheme, separator, rest = url.strip().partition("://")
    if not separator or scheme.lower() not in _SCHEMES:
        raise ValueError("must be a URL that starts with postgresql:// (or postgres://, postgresql+psycopg://)")
    result = f"postgresql://{rest}"
    if not _is_well_formed(result):
        raise ValueError("is not a well-formed URL; percent-encode special characters in the user and the password")
    return result


def _is_well_formed(url: str) -> bool:
    try:
        ports = str(conninfo_to_dict(url).get("port", "")).split(",")
    except (ProgrammingError, ValueError):
        return False  # the driver's text quotes the URL, so it ends here
    # libpq would cut the URL at a NUL, and look at the port only when it connects.
    return "\0" not in url and all(
        port == "" or (port.isascii() and port.isdigit() and 0 < int(port) <= _MAX_PORT) for port in ports
    )


def _none_by_name(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in {"", "none"} else value


def _default_data_dir() -> Path:
    # As root the embedded server opens every folder above its data to others: harmless in /var/lib, not in /root.
    return Path("/var/lib/kestra") if getattr(os, "geteuid", lambda: -1)() == 0 else Path("~/.kestra")


class Settings(BaseSettings):
    """The settings of one `Database`, immutable.

    Each field is read from `KESTRA_` and its name, then from its other aliases. A keyword argument wins over them all.

    Raises:
        ConfigurationError: A value is wrong. The error names the variable and never quotes the URL.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, populate_by_name=True, extra="forbid"
    )

    database_url: SecretStr | None = Field(
        None, validation_alias=AliasChoices("KESTRA_DATABASE_URL", "DATABASE_URL", "DATABASE_CONNECTION_URI")
    )
    """Where PostgreSQL is, as a libpq URL; None is the embedded server."""

    data_dir: Path = Field(default_factory=_default_data_dir, validate_default=True)
    """Where the embedded server keeps its data."""

    pool_min_size: int = Field(1, ge=0)
    pool_max_size: int = Field(20, ge=1, validation_alias=AliasChoices("KESTRA_POOL_MAX_SIZE", "DB_POOL_MAX_SIZE"))

    pool_timeout: float = Field(30.0, gt=0, allow_inf_nan=False)
    """Seconds to wait for a free connection before `PoolExhausted`."""

    connect_timeout: int = Field(10, ge=2)
    """Seconds to wait for the server to accept a connection; libpq allows no less than two."""

    prepare_threshold: Annotated[int | None, BeforeValidator(_none_by_name)] = Field(5, ge=0)
    """Executions before a statement is prepared on the server; `none` is never, for PgBouncer in transaction mode."""

    verify_on_open: bool = False
    """Run `Database.verify` before the first connection is handed out."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(f"{self._variables(item['loc'])} {item['msg']}" for item in error.errors())
            # From None: pydantic's own text quotes the value it refused, which may be a URL with a password.
            raise ConfigurationError(f"Wrong setting: {problems.replace('Value error, ', '')}.") from None

    @classmethod
    def _variables(cls, loc: tuple[int | str, ...]) -> str:
        """The environment variable behind an error: the one that is set, or the first of its names."""
        if not loc:
            return "KESTRA_POOL_MIN_SIZE"
        name = str(loc[0])
        names = next((names for field in cls.model_fields.values() if name in (names := _aliases(field))), [])
        if not names:
            return _PREFIX + name.upper()
        return next((candidate for candidate in names if os.environ.get(candidate)), names[0])

    @field_validator("database_url", mode="after")
    @classmethod
    def _one_form_of_url(cls, value: SecretStr | None) -> SecretStr | None:
        return None if value is None else SecretStr(_normalised(value.get_secret_value()))

    @field_validator("data_dir", mode="after")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="after")
    def _pool_sizes_in_order(self) -> Self:
        if self.pool_min_size > self.pool_max_size:
            raise ValueError(f"({self.pool_min_size}) is above KESTRA_POOL_MAX_SIZE ({self.pool_max_size})")
        return self


def _aliases(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [choice for choice in alias.choices if isinstance(choice, str)] if isinstance(alias, AliasChoices) else []
