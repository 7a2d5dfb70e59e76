"""Installations made up for tests: clients, their files, chats and messages as rows, each from its number alone.

Everything follows from the seed, the sizes and `now`, in integers: the same rows on any machine, and no more than one
chat in memory. A few clients have most of the chats. People write by day, in bursts, in Portuguese; assistants answer,
follow up on silence, and are paused; some messages arrive late. The state of a conversation is what recording its
messages one by one, in the order of their ids, leaves (docs/data-access.md).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import accumulate
from math import isqrt
from random import Random
from typing import Any, Final, NamedTuple, get_args
from uuid import UUID

from kestra.dao.conversations import WINDOW
from kestra.errors import InvalidValue
from kestra.models import Role, Status
from kestra.testing import content
from kestra.testing.content import AREA_CODES, LINES, below, mobile, pick

NOW: Final = datetime(2026, 1, 15, 15, tzinfo=UTC)
"""When generated installations end, unless it is said: no clock is asked, so that the rows are always the same."""

_YEARS: Final = range(1980, 3000)
"""Years of the epoch's calendar, with room for what happened before."""

Milliseconds = int
"""A moment, since 1970 in UTC."""

_DAY: Final = 86_400_000
_HOUR: Final = 3_600_000
_MINUTE: Final = 60_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY: Final = _EPOCH.toordinal()
_LOCAL: Final = -3 * _HOUR
"""America/Sao_Paulo, which has had no summer time since 2019. The zones of a machine may differ from another's."""

USER: Final[Role] = "user"
ASSISTANT: Final[Role] = "assistant"
SYSTEM: Final[Role] = "system"


class FileRow(NamedTuple):
    """A row of `client_files`, without its client."""

    id: UUID
    filename: str
    file_hash: str
    size_bytes: int
    media_type: str
    google_file_uri: str | None
    google_file_expires_at: Milliseconds | None


class ClientRow(NamedTuple):
    """A row of `clients`. The keys of its document are in the order of JSONB."""

    id: UUID
    name: str
    token: str
    system_prompt: str | None
    tools_config: dict[str, Any]
    created_at: Milliseconds


class ConversationRow(NamedTuple):
    """A row of `active_conversations`, without its client."""

    chat_id: str
    status: Status
    followup_stage: int
    last_role: Role
    last_message_at: Milliseconds
    last_context: str | None
    last_message_id: int
    last_user_message_at: Milliseconds | None
    last_user_message_id: int | None
    last_read_message_id: int | None
    last_context_message_id: int | None
    paused_until: Milliseconds | None
    claim_token: UUID | None
    claimed_until: Milliseconds | None


class MessageRow(NamedTuple):
    """A row of `chat_messages`, without its client."""

    id: int
    chat_id: str
    role: Role
    content: str | None
    media_url: str | None
    created_at: Milliseconds
    provider_message_id: str | None


Row = ClientRow | FileRow | ConversationRow | MessageRow


class Chat(NamedTuple):
    """A chat, whole; messages in the order in which they arrived, which is that of their ids."""

    conversation: ConversationRow
    messages: list[MessageRow]


class Tenant(NamedTuple):
    """A client with what its chats depend on.

    Attributes:
        number: From 0. The client with the most chats comes first.
        row: Its row.
        files: Its files, by id.
        chats: How many chats it has.
        delays: After how many minutes of silence each follow-up is sent; empty where none are.
        window: Whether the channel refuses what is sent a day after the end customer's last message.
    """

    number: int
    row: ClientRow
    files: list[FileRow]
    chats: int
    delays: tuple[int, ...]
    window: bool


class Installation:
    """All the rows of an installation, in the order in which foreign keys and exports want them.

    Attributes:
        clients: How many clients.
        chats: How many chats a client has on average.
        messages: How many messages a chat has on average.
        seed: What the rest is derived from.
        now: When it ends.
    """

    def __init__(
        self, *, clients: int = 50, chats: int = 200, messages: int = 40, seed: int = 7, now: datetime = NOW
    ) -> None:
        """Take the sizes.

        Raises:
            InvalidValue: A size is below 1, or `now` has no time zone or is not of the years 1980 to 2999.
        """
        for name, size in (("clients", clients), ("chats", chats), ("messages", messages)):
            if size < 1:
                raise InvalidValue(f"The number of {name} is at least 1, not {size}.")
        if now.utcoffset() is None:
            raise InvalidValue("now is a datetime with a time zone, such as 2026-01-15T15:00+00:00.")
        if now.year not in _YEARS:
            raise InvalidValue(f"now is of the years {_YEARS[0]} to {_YEARS[-1]}.")
        self.clients, self.chats, self.messages, self.seed, self.now = clients, chats, messages, seed, now
        self._now = (now - _EPOCH) // timedelta(milliseconds=1)
        self._chats_of = _shares(clients * chats, clients)
        self._texts = {role: self._some(f"{role}s texts", partial(content.text, role=role)) for role in get_args(Role)}
        self._follow_ups = self._some("follow-ups", content.followup_text)

    def rows(self) -> int:
        """How many rows there are, of every table."""
        return (
            self.clients
            + sum(_files(self._random("client", number)) for number in range(self.clients))
            + self.clients * self.chats
            + self.count_messages()
        )

    def count_messages(self) -> int:
        """How many messages there are."""
        return sum(
            self._length(self._digest("chat", number, chat))
            for number, chats in enumerate(self._chats_of)
            for chat in range(chats)
        )

    def tenants(self) -> Iterator[Tenant]:
        """The clients, the one with the most chats first."""
        return map(self.tenant, range(self.clients))

    def tenant(self, number: int) -> Tenant:
        """The client of this number."""
        random = self._random("client", number)
        files = _files(random)
        meta = random.random() < _META
        delays, config = _tools_config(number, random, meta=meta)
        name = content.company(random)
        row = ClientRow(
            id=self._uuid("client", number),
            name=name,
            # As WhatsApp numbers its phone numbers and Uazapi its instances; the number makes it unique.
            token=f"1{number:07}{below(random, 10**7):07}" if meta else str(self._uuid("token", number)),
            system_prompt=None if random.random() < _NO_PROMPT else content.system_prompt(random, name),
            tools_config=config,
            created_at=self._now - (400 + below(random, 1000)) * _DAY - below(random, _DAY),
        )
        rows = sorted(self._file(number, file) for file in range(files))
        return Tenant(number, row, rows, self._chats_of[number], delays, window=meta)

    def chats_of(self, tenant: Tenant, *, first_id: int) -> Iterator[Chat]:
        """The chats of a client, by the code points of their chat_id; messages are numbered from `first_id`."""
        for number in range(tenant.chats):
            chat = self.chat(tenant, number, first_id=first_id)
            yield chat
            first_id += len(chat.messages)

    def chat(self, tenant: Tenant, number: int, *, first_id: int) -> Chat:
        """The chat of this number."""
        digest = self._digest("chat", tenant.number, number)
        length = self._length(digest)
        random = Random(digest)  # noqa: S311  # not for secrets
        chat_id = self._chat_id(tenant, number, random)
        stage = _stage(length, tenant.delays, random)
        roles = _roles(length, stage, random)
        times = _times(roles, stage, tenant, random)
        # By whole days, so that it stays the same time of day.
        days = (self._now + _LOCAL - _MINUTE - times[-1]) // _DAY - _AGES[below(random, len(_AGES))]
        times = [time + days * _DAY - _LOCAL for time in times]
        _arrive_late(times, stage, random)
        prefix = f"{'wamid.HBgN' if tenant.window else '3EB0'}{_scattered(number):016X}"
        ids = range(first_id, first_id + length)
        said = self._said(roles, stage, prefix, random)
        messages = [
            MessageRow(message_id, chat_id, role, content, media_url, time, provider_id)
            for message_id, role, time, (content, media_url, provider_id) in zip(ids, roles, times, said, strict=True)
        ]
        return Chat(self._conversation(tenant, number, messages, stage, random), messages)

    # --- what depends on the seed ---

    def _digest(self, kind: str, *path: int, size: int = 16) -> int:
        return int.from_bytes(blake2b(f"{self.seed} {kind} {path}".encode(), digest_size=size).digest(), "big")

    def _random(self, kind: str, *path: int) -> Random:
        return Random(self._digest(kind, *path))  # noqa: S311  # not for secrets

    def _uuid(self, kind: str, *path: int) -> UUID:
        return UUID(int=self._digest(f"uuid of {kind}", *path), version=4)

    def _length(self, digest: int) -> int:
        """How many messages a chat has: on average, as many as was said."""
        share, fraction = _LENGTHS[digest % len(_LENGTHS)], (digest >> 8) % 100
        return 1 + ((self.messages - 1) * share + fraction) // 100

    def _some(self, kind: str, make: Callable[[Random], str]) -> list[str]:
        random = self._random(kind)
        return [make(random) for _ in range(_TEXTS)]

    def _file(self, client: int, number: int) -> FileRow:
        random = self._random("file", client, number)
        filename, media_type = pick(random, content.DOCUMENTS)
        uploaded = random.random() < _UPLOADED
        return FileRow(
            id=self._uuid("file", client, number),
            filename=filename,
            file_hash=f"{self._digest('content', client, number, size=32):064x}",
            size_bytes=10_000 + below(random, 5_000_000),
            media_type=media_type,
            google_file_uri=content.google_file_uri(random) if uploaded else None,
            # Of an upload in the last four days; two days later it is gone.
            google_file_expires_at=self._now + 2 * _DAY - below(random, 4 * _DAY) if uploaded else None,
        )

    def _chat_id(self, tenant: Tenant, number: int, random: Random) -> str:
        """Unique for the client, and ascending with the number. Some phone numbers are those of a pool of all clients.

        Each chat has a part of all numbers to itself.
        """
        groups, hidden, foreign = (tenant.chats * share // 100 for share in _OTHERS)
        phones = tenant.chats - groups - hidden - foreign
        kinds = (groups, hidden, phones, foreign)
        kind = bisect_right([*accumulate(kinds)], number)
        place, of = number - sum(kinds[:kind]), kinds[kind]
        start, end = place * _NUMBERS // of, (place + 1) * _NUMBERS // of
        drawn = start + below(random, end - start)
        if kind == _PHONES and random.random() < _SHARED:
            pool = 4 * self.chats
            shared = drawn * pool // _NUMBERS * _NUMBERS // pool
            drawn = shared if start <= shared < end else drawn
        match kind:
            case 0:
                return f"120363{drawn:012}@g.us"
            case 1:
                return f"2{drawn:014}@lid"
            case 2:
                area, line = divmod(drawn, LINES)
                return mobile(AREA_CODES[area], line)
        return f"US.1{drawn:015}"

    def _said(
        self, roles: Sequence[Role], stage: int, prefix: str, random: Random
    ) -> Iterator[tuple[str | None, str | None, str | None]]:
        """Content, media and the provider's id of each message."""
        draw, follow_ups = random.random, len(roles) - stage
        for place, role in enumerate(roles):
            texts = self._texts[role] if place < follow_ups else self._follow_ups
            text: str | None = texts[int(draw() * _TEXTS)]
            media_url = None
            dice = draw()
            if dice < _MEDIA[role]:
                suffix = pick(random, content.MEDIA_EXTENSIONS)
                media_url = f"https://midia.example/{prefix[-16:].lower()}{place:04x}.{suffix}"
                text = text if dice < _CAPTION * _MEDIA[role] and suffix not in _WITHOUT_CAPTION else None
            yield text, media_url, f"{prefix}{place:04X}" if dice < _HAS_PROVIDER_ID[role] else None

    def _conversation(
        self, tenant: Tenant, number: int, messages: list[MessageRow], stage: int, random: Random
    ) -> ConversationRow:
        """Where recording the messages, and what people and workers did then, has left the conversation."""
        newest = max(messages, key=_by_time)
        by_user = [message for message in messages if message.role == USER]
        heard_at = max((message.created_at for message in by_user), default=None)
        heard_id = by_user[-1].id if by_user else None
        known = max(newest.id, heard_id or 0)

        def up_to() -> int:
            return min(messages[int(random.random() * len(messages))].id, known)

        read = random.random()
        summarised = len(messages) > _LONG and random.random() < _SUMMARISED
        finished = random.random() < _FINISHED
        paused = random.random()
        paused_until = None
        if paused < _PAUSED_NOW:
            paused_until = self._now + (5 + below(random, 115)) * _MINUTE
        elif paused < _PAUSED_ONCE:
            paused_until = newest.created_at + 30 * _MINUTE
        claimed = (
            not (finished or paused < _PAUSED_NOW)
            and newest.role == ASSISTANT
            and self._due(tenant, stage, newest.created_at, heard_at)
            and random.random() < _CLAIMED
        )
        return ConversationRow(
            chat_id=newest.chat_id,
            status="finished" if finished else "active",
            followup_stage=stage,
            last_role=newest.role,
            last_message_at=newest.created_at,
            last_context=content.summary(random) if summarised else None,
            last_message_id=newest.id,
            last_user_message_at=heard_at,
            last_user_message_id=heard_id,
            last_read_message_id=known if read < _READ else up_to() if read < _READ_IN_PART else None,
            last_context_message_id=up_to() if summarised else None,
            paused_until=paused_until,
            claim_token=self._uuid("claim", tenant.number, number) if claimed else None,
            claimed_until=self._now + (1 + below(random, 9)) * _MINUTE if claimed else None,
        )

    def _due(self, tenant: Tenant, stage: int, last_at: Milliseconds, heard_at: Milliseconds | None) -> bool:
        """Whether a follow-up worker could have claimed the conversation."""
        if stage >= len(tenant.delays) or last_at + tenant.delays[stage] * _MINUTE > self._now:
            return False
        return not tenant.window or (heard_at is not None and self._now - heard_at < _WINDOW)


# --- distributions, in integers and in shares of 1 --------------------------------------------------------------------

_LENGTHS: Final = (
    *(2, 5, 8, 12, 15, 19, 23, 27, 31, 35, 40, 45, 50, 55, 60, 66),
    *(72, 79, 86, 94, 102, 111, 121, 133, 145, 159, 176, 196, 221, 255, 306, 451),
)
"""How long a chat is, in hundredths of the average: an exponential distribution, whose mean is 100."""

_META: Final = 0.4
_NO_PROMPT: Final = 0.05
_AI_OFF: Final = 0.05
_FOLLOWS_UP: Final = 0.65
_UPLOADED: Final = 0.7
_OTHERS: Final = (2, 6, 1)
"""How many chats of a hundred are groups, hidden numbers (`@lid`), and numbers that WhatsApp writes as `US.`."""

_PHONES: Final = 2
_SHARED: Final = 0.25
"""How many phone numbers are looked for in the pool of all clients."""

_NUMBERS: Final = len(AREA_CODES) * LINES

_WINDOW: Final = WINDOW // timedelta(milliseconds=1)

_TURNS: Final[tuple[tuple[Role, ...], ...]] = (
    *((USER, ASSISTANT),) * 7,
    *((USER, USER, ASSISTANT),) * 3,
    *((USER, ASSISTANT, ASSISTANT),) * 2,
    (USER, USER, USER, ASSISTANT),
    (USER, USER, USER, USER, ASSISTANT, ASSISTANT),
    (USER, USER),
    (USER,),
)
_NOTICE: Final = 0.03
_CAMPAIGN: Final = 0.05
"""Before how many turns the system notes something, and before how many the assistant speaks first."""

_STAGES: Final = (*(0,) * 14, *(1,) * 7, *(2,) * 4, *(3,) * 3, *(4,) * 2, *(5,) * 2)

_SESSIONS: Final = 30
"""A long chat is about so many sittings; a shorter one has a new one every sixth turn."""

_DAYS_BETWEEN: Final = (1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 7, 10, 14, 21, 30)
_AGES: Final = (*(0,) * 10, *range(1, 8), *range(1, 8), *range(8, 40))
"""How many days ago a chat ended."""

_BY_HOUR: Final = (2, 1, 1, 0, 0, 1, 3, 8, 17, 25, 28, 24, 16, 18, 24, 26, 25, 23, 20, 18, 17, 14, 9, 5)
_HOURS: Final = tuple(hour for hour, weight in enumerate(_BY_HOUR) for _ in range(weight))

_LATE: Final = 0.06
_TEXTS: Final = 1024
"""How many texts of each kind are made, to be drawn from."""

_MEDIA: Final[dict[Role, float]] = {USER: 0.12, ASSISTANT: 0.03, SYSTEM: 0.0}
_CAPTION: Final = 0.3
_WITHOUT_CAPTION: Final = frozenset({"ogg", "webp"})
_HAS_PROVIDER_ID: Final[dict[Role, float]] = {USER: 1.0, ASSISTANT: 0.75, SYSTEM: 0.0}
_LONG: Final = 20
_SUMMARISED: Final = 0.7
_FINISHED: Final = 0.25
_READ: Final = 0.6
_READ_IN_PART: Final = 0.8
_PAUSED_NOW: Final = 0.02
_PAUSED_ONCE: Final = 0.05
_CLAIMED: Final = 0.1

_OPEN: Final = 8
_CLOSED: Final = 20
"""From when until when follow-ups are sent where no window forces them to be sent at night."""


def _shares(total: int, clients: int) -> list[int]:
    """How many of all chats each client has: after Zipf, with an exponent of 5/4, and at least one."""
    scale = 10**9
    weights = [scale * scale // isqrt(isqrt(rank**5 * scale**4)) for rank in range(1, clients + 1)]
    spare, all_weights = total - clients, sum(weights)
    shares = [1 + spare * weight // all_weights for weight in weights]
    for number in range(total - sum(shares)):
        shares[number] += 1
    return shares


def _by_time(message: MessageRow) -> tuple[Milliseconds, int]:
    return message.created_at, message.id


def _scattered(number: int) -> int:
    """Another number of 64 bits, for each its own: the ids of providers do not ascend."""
    mixed = (number * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
    mixed ^= mixed >> 29
    return mixed * 0xBF58476D1CE4E5B9 % 2**64


def _files(random: Random) -> int:
    return below(random, 7)


def _stage(length: int, delays: Sequence[int], random: Random) -> int:
    """How many follow-ups were sent last, after at least one message of each side."""
    drawn = _STAGES[below(random, len(_STAGES))]
    return max(min(drawn, len(delays), length - 2), 0)


def _roles(length: int, stage: int, random: Random) -> list[Role]:
    roles: list[Role] = []
    while len(roles) < length:
        dice = random.random()
        if dice < _NOTICE:
            roles.append(SYSTEM)
        elif dice < _NOTICE + _CAMPAIGN:
            roles.append(ASSISTANT)
        roles += _TURNS[int(random.random() * len(_TURNS))]
    del roles[length:]
    if stage:
        roles[-stage - 2 :] = [USER, *(ASSISTANT,) * (stage + 1)]
    return roles


def _times(roles: Sequence[Role], stage: int, tenant: Tenant, random: Random) -> list[Milliseconds]:
    """When each message was sent, ascending, in local time since the midnight before the first one."""
    times: list[Milliseconds] = []
    follow_ups = len(roles) - stage
    pause = min(1 / 6, _SESSIONS / len(roles))
    time, before = _HOURS[below(random, len(_HOURS))] * _HOUR + below(random, _HOUR), SYSTEM
    for place, role in enumerate(roles):
        if place >= follow_ups:
            time = _followed_up(time + tenant.delays[place - follow_ups] * _MINUTE, tenant, random)
        elif role == USER and before != USER and random.random() < pause:
            day = time // _DAY + _DAYS_BETWEEN[int(random.random() * len(_DAYS_BETWEEN))]
            time = day * _DAY + _HOURS[int(random.random() * len(_HOURS))] * _HOUR + int(random.random() * _HOUR)
        elif role == USER:
            time += 2_000 + int(random.random() * (15_000 if before == USER else 600_000))
        else:
            time += 3_000 + int(random.random() * 40_000)
        # Channels tell the second in which a message was sent.
        times.append(time // 1000 * 1000 if role == USER else time)
        before = role
    return times


def _followed_up(due: Milliseconds, tenant: Tenant, random: Random) -> Milliseconds:
    """When the workers sent what was due then."""
    day, time = divmod(due, _DAY)
    if not tenant.window and not _OPEN * _HOUR <= time < _CLOSED * _HOUR:
        due = (day + (time >= _CLOSED * _HOUR)) * _DAY + _OPEN * _HOUR
    return due + below(random, _MINUTE)


def _arrive_late(times: list[Milliseconds], stage: int, random: Random) -> None:
    """In some chats one message, none of the last ones before follow-ups, was sent earlier than the one before it."""
    places = len(times) - (stage + 5 if stage else 2)
    if places > 0 and random.random() < _LATE:
        place = 2 + below(random, places)
        times[place] = times[place - 1] - 1000 * (1 + below(random, 90))


def _tools_config(number: int, random: Random, *, meta: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """A document as clients have them, and the delays of the follow-ups that are sent."""
    ai_active = random.random() >= _AI_OFF
    key = f"{below(random, 2**48):012x}"
    config: dict[str, Any] = {
        "ai_active": ai_active,
        "whatsapp": {"provider": "meta", "url": "https://graph.facebook.com/v23.0", "key": f"EAAG{key}"}
        if meta
        else {"provider": "uazapi", "url": f"https://kestra{number}.uazapi.com", "key": key},
    }
    if random.random() < 1 / 2:
        config["start_upper"] = random.random() < 1 / 2
    if random.random() < 1 / 4:  # of the same time as America/Sao_Paulo
        config["timezone"] = ("America/Recife", "America/Bahia", "America/Sao_Paulo")[below(random, 3)]
    if random.random() < 1 / 2:
        config["consultar_cep"] = True if random.random() < 1 / 2 else {"active": True, "limite_diario": 100}
    if random.random() < 1 / 3:
        config["agendar_visita"] = {"active": True, "calendario": content.company(random)}
    if random.random() < 1 / 2:
        config["business_hours"] = _business_hours()
    delays: tuple[int, ...] = ()
    if random.random() < _FOLLOWS_UP:
        stages = 1 + below(random, 5)
        # Together less than the window of a day.
        every = (15, 45, 120, 300, 600) if meta else (30, 120, 1440, 2880, 4320)
        config["followup"] = {
            "active": True,
            "stages": [
                {"delay_minutes": delay, "prompt": "Retome a conversa com cordialidade.", "type": "text"}
                for delay in every[:stages]
            ],
            "allowed_hours": {"enabled": not meta, "start": f"{_OPEN:02}:00", "end": f"{_CLOSED:02}:00"},
        }
        delays = every[:stages] if ai_active else ()
    elif random.random() < 1 / 2:
        config["followup"] = {"active": False}
    return delays, _as_jsonb(config)


def _business_hours() -> dict[str, Any]:
    week = {day: {"on": True, "start": "08:00", "end": "18:00"} for day in ("seg", "ter", "qua", "qui", "sex")}
    return {
        "active": True,
        "mode": "schedule",
        "schedule": {**week, "sab": {"on": True, "start": "08:00", "end": "12:00"}, "dom": {"on": False}},
        "off_message": "Estamos fechados agora. Respondemos assim que abrirmos!",
    }


def _as_jsonb(value: Any) -> Any:  # any JSON
    """The value with its keys in the order of JSONB: by length, then by bytes."""
    match value:
        case dict():
            return {key: _as_jsonb(value[key]) for key in sorted(value, key=lambda key: (len(key.encode()), key))}
        case list():
            return [_as_jsonb(item) for item in value]
    return value


# --- moments as text --------------------------------------------------------------------------------------------------

_MINUTES: Final = tuple(f"T{minute // 60:02}:{minute % 60:02}:" for minute in range(24 * 60))


@lru_cache(maxsize=4096)
def _date(day: int) -> str:
    return date.fromordinal(_EPOCH_DAY + day).isoformat()


def instant(moment: Milliseconds) -> str:
    """The moment as exports and PostgreSQL have it, in UTC with microseconds."""
    day, rest = divmod(moment, _DAY)
    minute, rest = divmod(rest, _MINUTE)
    return f"{_date(day)}{_MINUTES[minute]}{rest // 1000:02}.{rest % 1000:03}000+00:00"
