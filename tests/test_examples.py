"""The four programs of a customer service, one after the other, as README shows them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from kestra import Database
from kestra.dao import messages

ROOT: Final = Path(__file__).parents[1]
PROGRAMS: Final = ("webhook", "ai_worker", "followup_worker", "inbox")
TOKEN: Final = "token-da-padaria"  # noqa: S105  # the example's


def run(url: str, program: str, *arguments: str, given: str = "", code: int = 0) -> str:
    """What the program prints."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", ROOT / f"examples/{program}.py", *arguments],
        env={**os.environ, "KESTRA_DATABASE_URL": url, "PYTHONIOENCODING": "utf-8"},
        input=given,
        encoding="utf-8",
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stdout if code == 0 else ran.stdout + ran.stderr


def webhook(number: int, **changes: Any) -> str:
    message = {"token": TOKEN, "id": f"wamid.{number}", "chat": "5511999999999", "text": f"oi {number}"}
    return json.dumps({**message, "sent_at": 1772452800 + number, **changes})


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_short(program: str) -> None:
    assert len((ROOT / f"examples/{program}.py").read_text("utf-8").splitlines()) < 60


def test_a_day_at_the_bakery(database_url: str, db: Database) -> None:
    assert run(database_url, "inbox", "create", "Padaria", TOKEN).startswith("client ")
    lines = [webhook(1), webhook(2), webhook(1), webhook(3, chat="77@lid", text=None, media_url="https://m/1")]
    said = run(database_url, "webhook", given="\n".join(lines))
    assert said.splitlines() == ["1: stored", "2: stored", "3: known already", "4: stored"]
    listed = run(database_url, "inbox", "list", TOKEN)
    assert [line.split() for line in listed.splitlines()] == [
        ["77@lid", "active", "1"],
        ["5511999999999", "active", "2", "oi", "2"],
    ]

    assert sorted(run(database_url, "ai_worker", TOKEN).splitlines()) == ["answered 5511999999999", "answered 77@lid"]
    assert run(database_url, "ai_worker", TOKEN) == "", "nobody waits any more"

    assert run(database_url, "followup_worker") == "", "no policy, no follow-up"
    stage = {"delay_minutes": 0, "prompt": "Ainda está por aí?"}
    policy = {"followup": {"active": True, "stages": [stage]}, "whatsapp": {"key": "segredo"}}
    assert "segredo" not in run(database_url, "inbox", "configure", TOKEN, json.dumps(policy))
    followed_up = run(database_url, "followup_worker")
    assert sorted(followed_up.splitlines()) == [
        "to 5511999999999, stage 0: Ainda está por aí?",
        "to 77@lid, stage 0: Ainda está por aí?",
    ]
    assert run(database_url, "followup_worker") == "", "there is no second stage"

    read = run(database_url, "inbox", "read", TOKEN, "5511999999999")
    assert [line.split(" ", 3)[3] for line in read.splitlines()] == [
        "user: oi 1",
        "user: oi 2",
        "assistant: [no prompt] I read 2 messages; you said: oi 2",
        "assistant: Ainda está por aí?",
    ]
    assert "5511999999999        active       0" in run(database_url, "inbox", "list", TOKEN)
    with db.tenant_session(db.client_id_for_token(TOKEN)) as session:
        assert len(messages.history(session, chat_id="5511999999999").items) == 4


def test_a_bad_webhook_is_reported_and_does_not_hold_up_the_others(database_url: str) -> None:
    run(database_url, "inbox", "create", "Padaria", TOKEN)
    unknown = "um-token-secreto"
    lines = [webhook(1, token=unknown), "garbage", webhook(2, text=""), webhook(3, id=None), "{}", webhook(4)]
    said = run(database_url, "webhook", given="\n".join(lines), code=1)
    assert said.splitlines() == [
        "1: no client has this token",
        "2: JSONDecodeError",
        "3: InvalidValue",
        "4: stored",
        "5: KeyError",
        "6: stored",
    ]


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        ("inbox", (), "python examples/inbox.py create NAME TOKEN"),
        ("inbox", ("list",), "python examples/inbox.py list TOKEN"),
        ("inbox", ("list", "um-token-secreto"), "No client has this token"),
        ("inbox", ("read", TOKEN, "nobody"), "no conversation"),
        ("inbox", ("configure", TOKEN, "[]"), "inbox: "),
        ("inbox", ("configure", TOKEN, "{"), "inbox: "),
        ("inbox", ("create", "Outra", TOKEN), "already has this token"),
        ("ai_worker", ("um-token-secreto",), "No client has this token"),
    ],
)
def test_a_mistake_is_one_line_without_the_token(
    database_url: str, program: str, arguments: tuple[str, ...], says: str
) -> None:
    run(database_url, "inbox", "create", "Padaria", TOKEN)
    said = run(database_url, program, *arguments, code=1)
    assert says in said
    assert "um-token-secreto" not in said
    assert TOKEN not in said


def test_an_assistant_that_is_switched_off_answers_nobody(database_url: str) -> None:
    run(database_url, "inbox", "create", "Padaria", TOKEN)
    run(database_url, "webhook", given=webhook(1))
    run(database_url, "inbox", "configure", TOKEN, '{"ai_active": false}')
    assert "switched off" in run(database_url, "ai_worker", TOKEN, code=1)
