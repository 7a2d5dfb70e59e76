import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from kestra.errors import ConfigurationError
from kestra.settings import Settings

VARIABLES = ("KESTRA_", "DATABASE_", "DB_POOL_")
SECRET = "hunter2"  # noqa: S105  # stands for one


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)


def url_of(settings: Settings) -> str | None:
    return None if settings.database_url is None else settings.database_url.get_secret_value()


def test_nothing_configured_means_the_embedded_server_and_the_documented_pool() -> None:
    settings = Settings()
    assert settings.database_url is None
    assert (settings.pool_max_size, settings.pool_timeout, settings.prepare_threshold) == (20, 30.0, 5)
    assert settings.pool_min_size <= settings.pool_max_size


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("postgres://u:p@host:5432/db", "postgresql://u:p@host:5432/db"),
        ("postgresql://u:p@host/db", "postgresql://u:p@host/db"),
        ("postgresql+psycopg://u@h1,h2:6432/db?sslmode=require", "postgresql://u@h1,h2:6432/db?sslmode=require"),
        ("  POSTGRES://u@/db?host=/run/postgresql\n", "postgresql://u@/db?host=/run/postgresql"),
        ("postgresql://[::1]:5432/db", "postgresql://[::1]:5432/db"),
    ],
)
def test_every_accepted_url_becomes_a_libpq_url(given: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTRA_DATABASE_URL", given)
    assert url_of(Settings()) == read


@pytest.mark.parametrize(
    "given",
    [
        f"mysql://u:{SECRET}@host/db",
        f"postgresql+asyncpg://u:{SECRET}@host/db",
        f"host=h user=u password={SECRET}",
        f"postgresql://u:pa/{SECRET}@host/db",
        f"postgresql://u:{SECRET}@host:70000/db",
        f"postgresql://u:{SECRET}@host:٥٤٣٢/db",
        f"postgresql://u:{SECRET}@[::1/db",
        f"postgresql://u:{SECRET}%zz@host/db",
        f"postgresql://u:{SECRET}@host/db?{SECRET}=1",
        f"postgresql://u:{SECRET}\udc80%@host/db",
        SECRET,
    ],
)
@pytest.mark.parametrize("variable", ["KESTRA_DATABASE_URL", "DATABASE_URL", "DATABASE_CONNECTION_URI"])
def test_a_wrong_url_is_refused_by_the_name_of_its_variable_and_never_quoted(
    variable: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, given)
    with pytest.raises(ConfigurationError) as caught:
        Settings()
    assert f" {variable} " in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("given", [f"postgresql://host\0u:{SECRET}@h/db", f"postgresql://u:{SECRET}\udc80@host/db"])
def test_a_url_that_libpq_would_cut_or_not_read_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match="KESTRA_DATABASE_URL is not a well-formed URL") as caught:
        Settings(database_url=SecretStr(given))
    assert SECRET not in str(caught.value)


def test_a_password_is_in_no_representation() -> None:
    settings = Settings(database_url=f"postgresql://u:{SECRET}@host/db")
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_database_url_names_are_tried_in_order_and_empty_ones_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_CONNECTION_URI", "postgresql://third")
    assert url_of(Settings()) == "postgresql://third"
    monkeypatch.setenv("DATABASE_URL", "postgresql://second")
    assert url_of(Settings()) == "postgresql://second"
    monkeypatch.setenv("KESTRA_DATABASE_URL", "postgresql://first")
    assert url_of(Settings()) == "postgresql://first"
    assert url_of(Settings(database_url="postgresql://argument")) == "postgresql://argument"
    monkeypatch.setenv("KESTRA_DATABASE_URL", "")
    assert url_of(Settings()) == "postgresql://second"


def test_pool_settings_are_read_from_their_names_and_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_POOL_MAX_SIZE", "7")
    monkeypatch.setenv("KESTRA_POOL_MIN_SIZE", "2")
    monkeypatch.setenv("KESTRA_POOL_TIMEOUT", "1.5")
    monkeypatch.setenv("KESTRA_CONNECT_TIMEOUT", "3")
    settings = Settings()
    assert (settings.pool_max_size, settings.pool_min_size) == (7, 2)
    assert (settings.pool_timeout, settings.connect_timeout) == (1.5, 3)
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "9")
    assert Settings().pool_max_size == 9


@pytest.mark.parametrize(("given", "read"), [("none", None), ("None", None), ("0", 0), ("12", 12), ("", 5)])
def test_prepare_threshold_can_be_switched_off(given: str, read: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTRA_PREPARE_THRESHOLD", given)
    assert Settings().prepare_threshold == read


@pytest.mark.parametrize(
    ("variable", "given"),
    [
        ("KESTRA_POOL_MAX_SIZE", "0"),
        ("DB_POOL_MAX_SIZE", "many"),
        ("KESTRA_POOL_MIN_SIZE", "-1"),
        ("KESTRA_POOL_MIN_SIZE", "21"),
        ("KESTRA_POOL_TIMEOUT", "inf"),
        ("KESTRA_POOL_TIMEOUT", "0"),
        ("KESTRA_CONNECT_TIMEOUT", "1"),
        ("KESTRA_PREPARE_THRESHOLD", "-1"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_variable(
    variable: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, given)
    with pytest.raises(ConfigurationError, match=rf": {variable} "):
        Settings()


def test_every_wrong_value_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTRA_POOL_MAX_SIZE", "0")
    monkeypatch.setenv("KESTRA_POOL_TIMEOUT", "soon")
    with pytest.raises(ConfigurationError, match=r"KESTRA_POOL_MAX_SIZE .*; KESTRA_POOL_TIMEOUT "):
        Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(Settings(), "pool_max_size", 3)  # noqa: B010  # the type checker refuses the plain form


def test_the_data_folder_is_read_and_the_home_folder_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("KESTRA_DATA_DIR", "~/data")
    assert Settings().data_dir == Path("/somewhere/data")


@pytest.mark.parametrize(("uid", "folder"), [(0, "/var/lib/kestra"), (1000, "/somewhere/.kestra")])
def test_the_data_folder_of_root_is_not_in_its_home(uid: int, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert Settings().data_dir == Path(folder)


def test_a_dotenv_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("KESTRA_POOL_MAX_SIZE=3\n")
    monkeypatch.chdir(tmp_path)
    assert Settings().pool_max_size == 20


def test_importing_reads_nothing_from_the_environment() -> None:
    environment = {**os.environ, "KESTRA_DATABASE_URL": "garbage", "KESTRA_POOL_MAX_SIZE": "garbage"}
    subprocess.run([sys.executable, "-c", "import kestra, kestra.settings"], env=environment, check=True)
