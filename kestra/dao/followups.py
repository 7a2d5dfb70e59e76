"""Follow-ups: a message to an end customer who has fallen silent, sent by one worker of many, once.

A worker's round holds no connection while it writes and sends::

    with db.system_session(reason="follow-up sweep") as session:
        waiting = followups.clients_due(session)
    for client_id in waiting:
        with db.tenant_session(client_id) as session:
            claims = followups.claim(session, limit=20, lease=timedelta(minutes=10))
        for claimed in claims:
            text = write(claimed)
            try:
                with db.tenant_session(client_id) as session:
                    claimed = followups.renew(session, claim=claimed, lease=timedelta(minutes=2))
                sent_id = send(claimed, text)
                with db.tenant_session(client_id) as session:
                    followups.complete(session, claim=claimed, content=text, provider_message_id=sent_id)
            except ClaimLost:
                continue

A bounded batch from each client in turn is what makes it fair. `renew` immediately before the message is sent makes
sure that nobody has answered meanwhile; its lease has to outlast the sending. A worker that stops between sending and
`complete` leaves a claim that runs out, and the message is sent again: give the provider a key of its own where it
takes one.

`claim` locks conversations, and what follows has to lock the chat before its conversation: in the transaction that has
claimed, it could wait for a webhook that waits for it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, Self
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    Integer,
    Interval,
    Select,
    TableValuedAlias,
    Text,
    Uuid,
    bindparam,
    cast,
    column,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.types import TypeEngine

from kestra.columns import EARLIEST, Timestamptz
from kestra.dao.clock import NOW
from kestra.dao.conversations import STATE, WINDOW, ConversationState
from kestra.dao.keyset import check_limit
from kestra.dao.locking import chat_locked
from kestra.dao.messages import IncomingMessage, Recorded, check, record
from kestra.dao.tables import CLIENTS, CONVERSATIONS
from kestra.errors import ClaimLost, InvalidValue
from kestra.session import SystemSession, TenantSession, require_system, require_tenant
from kestra.tools_config import AllowedHours, FollowUp, FollowUpStage, ToolsConfig, WhatsApp

STAGES: Final = 5
"""How many follow-ups an end customer gets at most: a conversation of stage 5 has had all of them."""

MAX_LEASE: Final = timedelta(days=1)
"""The longest lease. A worker that stops leaves its conversations to nobody for so long."""

logger = logging.getLogger(__name__)


_DAY: Final = timedelta(hours=24)
# Before every message: a bound that bounds nothing, where the statement has one.


# --- the policy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policy:
    """What a client's configuration says about follow-ups.

    Attributes:
        steps: What is sent, by the stage that a conversation is at. A stage that is not here is never due.
        hours: From when and until when follow-ups may be sent, since midnight in the client's zone; None is always. The
            end is not included; over midnight when it is before the start.
        zone: The client's zone.
        enforces_window: Whether the channel refuses what is sent 24 hours after the end customer's last message.
    """

    steps: Mapping[int, FollowUpStage]
    hours: tuple[timedelta, timedelta] | None
    zone: ZoneInfo
    enforces_window: bool

    @classmethod
    def of(cls, config: ToolsConfig) -> Self:
        """The policy of a document. Without steps where `followup` is not active, or `ai_active` is false.

        Raises:
            ConfigurationError: This machine has no time zones.
        """
        followup = config.followup or FollowUp()
        stages = followup.stages if followup.active and config.ai_active is not False else None
        return cls(
            steps={
                number: stage for number, stage in enumerate((stages or [])[:STAGES]) if stage.delay_minutes is not None
            },
            hours=_hours(followup.allowed_hours or AllowedHours()),
            zone=config.zone(),
            enforces_window=(config.whatsapp or WhatsApp()).enforces_window,
        )

    def allows(self, now: datetime) -> bool:
        """Whether follow-ups may be sent at this time of day."""
        if self.hours is None:
            return True
        (start, end), local = self.hours, now.astimezone(self.zone)
        time = timedelta(hours=local.hour, minutes=local.minute, seconds=local.second)
        return start <= time < end if start <= end else time >= start or time < end

    def silent_since(self, now: datetime) -> dict[int, datetime]:
        """The stages that may be sent now, the last one first: since when at least nobody may have said anything."""
        if not self.allows(now):
            return {}
        return {stage: since for stage in sorted(self.steps, reverse=True) if (since := self._silent_since(stage, now))}

    def heard_after(self, now: datetime) -> datetime:
        """After when the end customer must have said something, so that the channel takes a message."""
        return now - WINDOW if self.enforces_window else EARLIEST

    def _silent_since(self, stage: int, now: datetime) -> datetime | None:
        try:
            since = now - timedelta(minutes=self.steps[stage].delay_minutes or 0)
        except OverflowError:  # a delay that no calendar can hold is never over
            return None
        return since if since >= EARLIEST else None


def _hours(allowed: AllowedHours) -> tuple[timedelta, timedelta] | None:
    if not allowed.enabled:
        return None
    return _since_midnight(allowed.start, blank=timedelta()), _since_midnight(allowed.end, blank=_DAY)


def _since_midnight(time: str | None, *, blank: timedelta) -> timedelta:
    if not time:
        return blank
    hours, minutes, seconds = (*map(int, time.split(":")), 0)[:3]
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


# --- what is due ------------------------------------------------------------------------------------------------------


def _literal(value: str | int) -> ColumnElement[Any]:
    """Written into the SQL: from a parameter a generic plan cannot prove the predicate of the index."""
    return literal(value, literal_execute=True)


def _due(
    *,
    stage: ColumnElement[int],
    silent_since: ColumnElement[datetime],
    heard_after: ColumnElement[datetime],
    enforces_window: ColumnElement[bool],
    now: ColumnElement[datetime],
) -> tuple[ColumnElement[bool], ...]:
    """The conversations of a stage that a follow-up may be sent to, by the index `ix_active_conversations_due`."""
    columns = CONVERSATIONS.c
    return (
        columns.status == _literal("active"),
        columns.last_role == _literal("assistant"),
        columns.followup_stage < _literal(STAGES),
        columns.followup_stage == stage,
        columns.last_message_at <= silent_since,
        _heard(heard_after, enforces_window),
        _UNANSWERED,
        _over(columns.claimed_until, now),
        _over(columns.paused_until, now),
    )


def _heard(heard_after: ColumnElement[datetime], enforces_window: ColumnElement[bool]) -> ColumnElement[bool]:
    """Whether the channel takes a message now."""
    return or_(not_(enforces_window), CONVERSATIONS.c.last_user_message_at > heard_after)


# Providers count in seconds, so an answer can be "sent" before what it answers. Its id says when it arrived.
_UNANSWERED: Final = (CONVERSATIONS.c.last_user_message_id > CONVERSATIONS.c.last_message_id).is_not(true())


def _over(until: ColumnElement[datetime], now: ColumnElement[datetime]) -> ColumnElement[bool]:
    return or_(until.is_(None), until <= now)


def _policies(**columns: TypeEngine[Any]) -> TableValuedAlias:
    """The policies that are given as arrays, a parameter for each column: a row for each stage of each client."""
    arrays = func.unnest(*(bindparam(name, type_=ARRAY(kind)) for name, kind in columns.items()))
    return arrays.table_valued(*(column(name, kind) for name, kind in columns.items()), name="policy").render_derived()


_AT: Final = bindparam("now", type_=Timestamptz)

# A document that breaks the types must not keep the others from being read, so it is read as plain JSON.
_DOCUMENT: Final = type_coerce(CLIENTS.c.tools_config, JSONB)

# As text, and read one by one.
_FOLLOWING_UP: Final = select(CLIENTS.c.id, cast(_DOCUMENT, Text), NOW).where(
    CLIENTS.c.tools_config.contains({"followup": {"active": True}})
)


def _clients_due() -> Select[UUID]:
    """The clients with a conversation that is due, the one whose conversation has been due for longest first.

    A join and no lateral first row of each stage: Citus refuses a limit there, across clients.
    """
    policy = _policies(
        client_id=Uuid(),
        stage=Integer(),
        silent_since=Timestamptz(),
        heard_after=Timestamptz(),
        enforces_window=Boolean(),
    )
    overdue = policy.c.silent_since - CONVERSATIONS.c.last_message_at
    return (
        select(CONVERSATIONS.c.client_id)
        .join(policy, policy.c.client_id == CONVERSATIONS.c.client_id)
        .where(
            *_due(
                stage=policy.c.stage,
                silent_since=policy.c.silent_since,
                heard_after=policy.c.heard_after,
                enforces_window=policy.c.enforces_window,
                now=_AT,
            ),
            # Of a conversation whose window has closed nobody has said anything since: it ends the walk of the index.
            CONVERSATIONS.c.last_message_at > policy.c.heard_after,
            # The same bounds once more, as rows: the planner takes each for another one and expects little of a walk of
            # the index. Without them it reads, of some hundred thousand conversations, all that wait for an answer.
            tuple_(CONVERSATIONS.c.followup_stage, CONVERSATIONS.c.last_message_at)
            > tuple_(policy.c.stage, policy.c.heard_after),
            tuple_(CONVERSATIONS.c.followup_stage, CONVERSATIONS.c.last_message_at)
            <= tuple_(policy.c.stage, policy.c.silent_since),
        )
        .group_by(CONVERSATIONS.c.client_id)
        .order_by(func.max(overdue).desc(), CONVERSATIONS.c.client_id)
        .limit(bindparam("limit"))
    )


_CLIENTS_DUE: Final = _clients_due()


class _Stage(NamedTuple):
    client_id: UUID
    stage: int
    silent_since: datetime
    heard_after: datetime
    enforces_window: bool


def clients_due(session: SystemSession, *, now: datetime | None = None, limit: int = 100) -> list[UUID]:
    """The clients with a follow-up to send now, the one that has waited longest first.

    A client whose `tools_config` is invalid is left out, and the log says so.

    Args:
        session: A session over all clients.
        now: What counts as now, aware; None is the database's clock.
        limit: At most so many clients.

    Raises:
        InvalidValue: The limit is out of bounds, or `now` has no time zone.
        ConfigurationError: This machine has no time zones.
    """
    require_system(session)
    check_limit(limit)
    stages: list[_Stage] = []
    at: datetime | None = None
    for client_id, document, at in session.execute(_FOLLOWING_UP, {"now": now}):
        try:
            policy = Policy.of(ToolsConfig.model_validate_json(document))
        except InvalidValue as error:
            logger.warning("no follow-ups for client %s: %s", client_id, type(error).__name__)
            continue
        heard_after = policy.heard_after(at)
        stages += [
            _Stage(client_id, stage, since, heard_after, policy.enforces_window)
            for stage, since in policy.silent_since(at).items()
        ]
    if not stages:
        return []
    given: dict[str, object] = {"now": at, "limit": limit}
    given |= {name: [getattr(stage, name) for stage in stages] for name in _Stage._fields}
    return list(session.scalars(_CLIENTS_DUE, given))


# --- claims -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of one worker to send one follow-up, for a while.

    Attributes:
        chat_id: The conversation.
        token: What tells this claim from any other.
        stage: The stage of the conversation, 0 to 4.
        until: When the claim ends by itself.
        step: What is to be sent. A part of the policy when it was claimed.
        state: Where the conversation stands.
        context: The summary of the conversation.
    """

    chat_id: str
    token: UUID = field(repr=False)
    stage: int
    until: datetime
    step: FollowUpStage
    state: ConversationState
    context: str | None = field(repr=False)


_POLICY: Final = select(_DOCUMENT, NOW)


def _claim() -> ReturningUpdate[*tuple[Any, ...]]:
    """Give conversations that are due to the token, of each stage those that have been silent for longest.

    The outer limit stops the loop over the stages, and each stage locks a row when it is asked for one: no more rows
    are locked than are taken. Locking makes the CTE run once, whatever the plan of the rest is.
    """
    policy = _policies(stage=Integer(), silent_since=Timestamptz())
    heard_after = bindparam("heard_after", type_=Timestamptz)
    of_stage = (
        select(CONVERSATIONS.c.chat_id)
        .where(
            *_due(
                stage=policy.c.stage,
                silent_since=policy.c.silent_since,
                heard_after=heard_after,
                enforces_window=bindparam("enforces_window", type_=Boolean),
                now=_AT,
            ),
            # A row, because of two bounds that it does not know the planner expects next to nothing between them: it
            # would read all that is due and sort it, where a walk along the index ends at the limit.
            tuple_(CONVERSATIONS.c.followup_stage, CONVERSATIONS.c.last_message_at)
            > tuple_(policy.c.stage, heard_after),
        )
        .order_by(CONVERSATIONS.c.last_message_at)
        .limit(bindparam("limit"))
        .with_for_update(skip_locked=True)
        .lateral("of_stage")
    )
    due = select(of_stage.c.chat_id).select_from(policy.join(of_stage, true())).limit(bindparam("limit")).cte("due")
    return (
        update(CONVERSATIONS)
        .where(CONVERSATIONS.c.chat_id == due.c.chat_id)
        .values(
            claim_token=bindparam("token", type_=Uuid),
            claimed_until=bindparam("until", type_=Timestamptz),
        )
        .returning(*STATE, CONVERSATIONS.c.last_context)
    )


_CLAIM: Final = _claim()


def claim(session: TenantSession, *, limit: int, lease: timedelta, now: datetime | None = None) -> list[Claim]:
    """Follow-ups that are due, for this worker alone until the lease ends: at most `limit`, and none that are locked.

    Later stages come first, so that what is chained to a message follows it. Nothing is waited for. Commit before
    anything is sent, and before any of the claims is completed.

    Args:
        session: A session of the client.
        limit: At most so many.
        lease: How long they are this worker's, at most a day.
        now: What counts as now, aware; None is the database's clock.

    Raises:
        InvalidToolsConfig: The client's configuration is invalid.
        InvalidValue: The limit or the lease is out of bounds, or `now` has no time zone.
        ConfigurationError: This machine has no time zones.
    """
    require_tenant(session)
    check_limit(limit)
    _check(lease)
    row = session.execute(_POLICY, {"now": now}).one_or_none()
    if row is None:  # no such client
        return []
    document, at = row
    policy = Policy.of(ToolsConfig.model_validate(document))
    silent_since = policy.silent_since(at)
    if not silent_since:
        return []
    token, until = uuid4(), at + lease
    rows = session.execute(
        _CLAIM,
        {
            "stage": list(silent_since),
            "silent_since": list(silent_since.values()),
            "heard_after": policy.heard_after(at),
            "enforces_window": policy.enforces_window,
            "now": at,
            "limit": limit,
            "token": token,
            "until": until,
        },
    )
    claims = []
    for *columns, context in rows:
        state = ConversationState(*columns)
        stage = state.followup_stage
        claims.append(Claim(state.chat_id, token, stage, until, policy.steps[stage], state, context))
    return sorted(claims, key=lambda claimed: (-claimed.stage, claimed.state.last_message_at))


_CHAT: Final = bindparam("chat", type_=Text)

_OWN: Final = (
    chat_locked(_CHAT),
    CONVERSATIONS.c.chat_id == _CHAT,
    CONVERSATIONS.c.claim_token == bindparam("token", type_=Uuid),
)

_LIVE: Final = (
    CONVERSATIONS.c.claimed_until > NOW,
    CONVERSATIONS.c.status == "active",
    CONVERSATIONS.c.last_role == "assistant",
    _UNANSWERED,
)

_RENEW: Final = (
    update(CONVERSATIONS)
    .where(
        *_OWN,
        *_LIVE,
        _over(CONVERSATIONS.c.paused_until, NOW),
        _heard(bindparam("heard_after", type_=Timestamptz), bindparam("enforces_window", type_=Boolean)),
    )
    .values(claimed_until=NOW + bindparam("lease", type_=Interval))
    .returning(CONVERSATIONS.c.claimed_until, *STATE, CONVERSATIONS.c.last_context)
)

_RELEASE: Final = (
    update(CONVERSATIONS).where(*_OWN).values(claim_token=None, claimed_until=None).returning(CONVERSATIONS.c.chat_id)
)


_COMPLETE: Final = (
    update(CONVERSATIONS)
    .where(*_OWN, *_LIVE)
    .values(followup_stage=CONVERSATIONS.c.followup_stage + 1, claim_token=None, claimed_until=None)
    .returning(CONVERSATIONS.c.chat_id)
)


def renew(session: TenantSession, *, claim: Claim, lease: timedelta, now: datetime | None = None) -> Claim:
    """The claim with a lease from now on, and what the conversation has become; what is sent now may be sent.

    The policy is looked at again: its stages, its hours, the window. Not the delay: the worker's own message, which the
    provider echoes, would end the claim that it belongs to. Commit before the message is sent; what was sent is
    completed, even where a later renewal says that nothing more may be.

    Args:
        session: A session of the client.
        claim: A claim of this worker.
        lease: How long it is this worker's, at most a day.
        now: What counts as now, aware; None is the database's clock.

    Raises:
        ClaimLost: The claim is over, the conversation is paused, finished or answered, or the policy has no such stage
            (any more, or at this hour).
        InvalidToolsConfig: The client's configuration is invalid.
        InvalidValue: The lease is out of bounds, or `now` has no time zone.
    """
    require_tenant(session)
    _check(lease)
    given = {"chat": claim.chat_id, "now": now}
    # The chat is locked here, so that the lease counts from a moment after the wait.
    row = session.execute(_POLICY.where(chat_locked(_CHAT)), given).one_or_none()
    if row is None:  # no such client any more
        raise ClaimLost(claim.chat_id)
    document, at = row
    policy = Policy.of(ToolsConfig.model_validate(document))
    if claim.stage not in policy.silent_since(at):
        raise ClaimLost(claim.chat_id)
    window = {"enforces_window": policy.enforces_window, "heard_after": policy.heard_after(at)}
    renewed = session.execute(_RENEW, {**given, **window, "token": claim.token, "lease": lease}).one_or_none()
    if renewed is None:
        raise ClaimLost(claim.chat_id)
    until, *columns, context = renewed
    return replace(
        claim, until=until, step=policy.steps[claim.stage], state=ConversationState(*columns), context=context
    )


def release(session: TenantSession, *, claim: Claim) -> bool:
    """Whether the claim was still this worker's. Anybody can claim the conversation again at once.

    After a failure to send let the lease run out instead: it is the pause before the next attempt.
    """
    require_tenant(session)
    given = {"chat": claim.chat_id, "token": claim.token}
    return session.execute(_RELEASE, given).one_or_none() is not None


def complete(
    session: TenantSession,
    *,
    claim: Claim,
    content: str | None,
    media_url: str | None = None,
    provider_message_id: str | None = None,
    sent_at: datetime | None = None,
    now: datetime | None = None,
) -> Recorded:
    """Record the follow-up that was sent, and take the conversation to the next stage: both, or neither.

    A message that the provider has echoed already, by the same id, stays the only one, and the stage advances. Where
    the echo came under another chat_id it stays there: this conversation's time does not move, and its next stage may
    be due early.

    Args:
        session: A session of the client. Its transaction has claimed nothing.
        claim: A claim of this worker.
        content: The text that was sent.
        media_url: Where the medium is that was sent.
        provider_message_id: The provider's id of the sent message.
        sent_at: When it was sent. Worth saying where sending took long: an answer to it may have arrived meanwhile.
        now: What counts as now, aware; None is the database's clock.

    Raises:
        ClaimLost: The claim is over: answered, expired, paused, finished or completed. Nothing was written.
        InvalidValue: A part of the message cannot be stored, or `now` has no time zone.
    """
    require_tenant(session)
    message = IncomingMessage(claim.chat_id, "assistant", content, media_url, provider_message_id, sent_at)
    check(message)  # before anything is written
    given = {"chat": claim.chat_id, "token": claim.token, "now": now}
    if session.execute(_COMPLETE, given).one_or_none() is None:
        raise ClaimLost(claim.chat_id)
    return record(
        session,
        chat_id=message.chat_id,
        role=message.role,
        content=content,
        media_url=media_url,
        provider_message_id=provider_message_id,
        sent_at=sent_at,
        now=now,
    )


def _check(lease: timedelta) -> None:
    given: object = lease  # annotations bind nobody
    if not isinstance(given, timedelta) or not timedelta() < given <= MAX_LEASE:
        raise InvalidValue(f"A lease is longer than nothing and at most {MAX_LEASE.days} day, not {lease}.")
