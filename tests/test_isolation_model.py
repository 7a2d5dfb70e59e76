"""Random operations of two clients, held against a model in memory: each always sees what it wrote, and no more."""

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from kestra import ActiveConversation, ChatMessage, Client, Database, TenantSession
from kestra.errors import CrossTenantWrite

tenants = st.sampled_from([0, 1])
chats = st.sampled_from(["1", "2", "3"])
contents = st.sampled_from(["a", "b", "c"])
statuses = st.sampled_from(["active", "finished"])
messages: Any = ChatMessage.__table__
numbers = count()


def _unit_of_work(session: TenantSession, row: dict[str, Any]) -> None:
    session.add(ChatMessage(**row))


def _insert(session: TenantSession, row: dict[str, Any]) -> None:
    session.execute(insert(ChatMessage).values(row))


def _core_insert(session: TenantSession, row: dict[str, Any]) -> None:
    session.execute(insert(messages), [row])


def _bulk(session: TenantSession, row: dict[str, Any]) -> None:
    session.bulk_insert_mappings(ChatMessage.__mapper__, [row])


def _merge(session: TenantSession, row: dict[str, Any]) -> None:
    session.merge(ChatMessage(**row))


class TwoClients(RuleBasedStateMachine):
    """What two clients may do, on the database and in the model."""

    db: Database

    def __init__(self) -> None:
        super().__init__()
        with self.db.system_session(reason="model") as session:
            clients = [Client(name=f"model {number}", token=f"model-{next(numbers)}") for number in range(2)]
            session.add_all(clients)
            session.flush()
            self.ids: list[UUID] = [client.id for client in clients]
        self.said: list[Counter[tuple[str, str]]] = [Counter(), Counter()]
        self.status: list[dict[str, str]] = [{}, {}]

    def _rows(self, chat: str, content: str) -> dict[str, Any]:
        return {"chat_id": chat, "role": "user", "content": content}

    @rule(
        tenant=tenants,
        chat=chats,
        content=contents,
        way=st.sampled_from([_unit_of_work, _insert, _core_insert, _bulk, _merge]),
        kept=st.booleans(),
    )
    def say(
        self, tenant: int, chat: str, content: str, way: Callable[[TenantSession, dict[str, Any]], None], *, kept: bool
    ) -> None:
        with self.db.tenant_session(self.ids[tenant]) as session:
            way(session, self._rows(chat, content))
            if not kept:
                session.rollback()
        if kept:
            self.said[tenant][chat, content] += 1

    @rule(tenant=tenants, chat=chats, content=contents)
    def say_for_the_other(self, tenant: int, chat: str, content: str) -> None:
        with pytest.raises(CrossTenantWrite), self.db.tenant_session(self.ids[tenant]) as session:
            session.add(ChatMessage(client_id=self.ids[1 - tenant], **self._rows(chat, content)))

    @rule(tenant=tenants, chat=chats)
    def copy(self, tenant: int, chat: str) -> None:
        copied = select(ChatMessage.chat_id, ChatMessage.role, ChatMessage.content).where(ChatMessage.chat_id == chat)
        with self.db.tenant_session(self.ids[tenant]) as session:
            session.execute(insert(ChatMessage).from_select(["chat_id", "role", "content"], copied))
        for key, number in list(self.said[tenant].items()):
            if key[0] == chat:
                self.said[tenant][key] += number

    @rule(tenant=tenants, old=contents, new=contents, core=st.booleans())
    def rewrite(self, tenant: int, old: str, new: str, *, core: bool) -> None:
        table = messages if core else ChatMessage
        with self.db.tenant_session(self.ids[tenant]) as session:
            session.execute(update(table).where(ChatMessage.content == old).values(content=new))
        self.said[tenant] = self._moved(tenant, lambda chat, content: (chat, new if content == old else content))

    @rule(tenant=tenants, chat=chats)
    def silence(self, tenant: int, chat: str) -> None:
        with self.db.tenant_session(self.ids[tenant]) as session:
            session.execute(
                delete(ChatMessage)
                .where(ActiveConversation.chat_id == ChatMessage.chat_id, ActiveConversation.chat_id == chat)
                .execution_options(synchronize_session=False)
            )
        if chat in self.status[tenant]:
            self.said[tenant] = Counter({key: n for key, n in self.said[tenant].items() if key[0] != chat})

    @rule(tenant=tenants, chat=chats, status=statuses)
    def upsert(self, tenant: int, chat: str, status: str) -> None:
        row = pg_insert(ActiveConversation).values(chat_id=chat, status=status)
        with self.db.tenant_session(self.ids[tenant]) as session:
            session.execute(
                row.on_conflict_do_update(index_elements=["chat_id", "client_id"], set_={"status": row.excluded.status})
            )
        self.status[tenant][chat] = status

    @rule(tenant=tenants, chat=chats)
    def look_up_the_other(self, tenant: int, chat: str) -> None:
        with self.db.tenant_session(self.ids[tenant]) as session:
            assert session.get(ActiveConversation, (chat, self.ids[1 - tenant])) is None
            assert session.get(Client, self.ids[1 - tenant]) is None

    @invariant()
    def each_sees_its_own(self) -> None:
        for tenant, client_id in enumerate(self.ids):
            with self.db.tenant_session(client_id) as session:
                rows = session.execute(select(messages.c.chat_id, messages.c.content))
                assert Counter(map(tuple, rows)) == +self.said[tenant]
                states = session.execute(select(ActiveConversation.chat_id, ActiveConversation.status))
                assert {row.chat_id: row.status for row in states} == self.status[tenant]
                joined = (
                    select(func.count())
                    .select_from(ActiveConversation)
                    .join(ChatMessage, ChatMessage.chat_id == ActiveConversation.chat_id)
                )
                talking = sum(n for (chat, _), n in self.said[tenant].items() if chat in self.status[tenant])
                assert session.scalar(joined) == talking

    def _moved(self, tenant: int, to: Callable[[str, str], tuple[str, str]]) -> Counter[tuple[str, str]]:
        moved: Counter[tuple[str, str]] = Counter()
        for key, number in self.said[tenant].items():
            moved[to(*key)] += number
        return moved


@pytest.mark.usefixtures("layers")
def test_two_clients_never_meet(db: Database) -> None:
    machine = type("Machine", (TwoClients,), {"db": db})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
