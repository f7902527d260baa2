"""A primary and two standbys: who reads what from where, and what is left when they go away one by one (G15).

The servers' own logs are the witnesses: each statement of the applications' role is in them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import pytest
from sqlalchemy import (
    URL,
    Column,
    ForeignKey,
    Integer,
    MetaData,
    NullPool,
    Sequence,
    String,
    Table,
    create_engine,
    delete,
    exists,
    func,
    insert,
    lambda_stmt,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.schema import CreateTable
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, on_primary, session
from sqlasession_middleware.tenants import TenantsMiddleware

from .servers import PATIENCE
from .standbys import Cluster, Node, Standby, replicated

CLIENTS = 16
#: for each client and each way to commit: more than a thousand in all
PAIRS = 32
#: a row that all servers have
SEED = "seed"
#: read_only_sql_transaction, and what a standby says of it
REFUSED = re.compile("ERROR:  25006|cannot execute")


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "replicated"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(80), unique=True)
    notes: Mapped[list[Note]] = relationship()


class Note(Base):
    __tablename__ = "noted"
    id: Mapped[int] = mapped_column(primary_key=True)
    row_id: Mapped[int] = mapped_column(ForeignKey("replicated.id"))


def prepare(cluster: Cluster) -> None:
    """Make the tables and a row that all servers have, and let the servers log what they are asked."""
    # By the role, so that what the tests themselves ask as the administrator is not in the logs.
    cluster.primary.administer(
        "ALTER ROLE outage SET log_statement = 'all'",
        "ALTER ROLE outage SET log_error_verbosity = 'verbose'",  # with the SQLSTATE
    )
    direct = create_engine(cluster.primary.url, poolclass=NullPool)
    Base.metadata.create_all(direct)
    with Session(direct) as storing, storing.begin():
        storing.add(Row(token=SEED, notes=[Note()]))
    # One that crashes begins again from there, and answers before it has replayed the rest.
    cluster.primary.administer("CHECKPOINT")
    settle(cluster, *cluster.standbys)
    for standby in cluster.standbys:
        standby.administer("CHECKPOINT")


def settle(cluster: Cluster, *standbys: Standby) -> None:
    """Return when these have all that the primary has logged."""
    # A commit also flushes what others have logged and not committed: a standby gets to see only what is flushed.
    cluster.primary.ask("SELECT pg_logical_emit_message(true, 'tests', 'settle')")
    lsn = cluster.primary.lsn()
    for standby in standbys:
        standby.wait_for(lsn)


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[Cluster]:
    with replicated() as cluster:
        prepare(cluster)
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """All three are up, and the standbys have all, whatever a test does."""
    yield running_cluster
    for standby in running_cluster.standbys:
        if standby.process is None:
            standby.start()
        standby.resume_replay()
    settle(running_cluster, *running_cluster.standbys)


@contextmanager
def application(cluster: Cluster, app: WSGIApplication, **options: Any) -> Iterator[SQLASessionMiddleware]:
    """An application on the cluster, which holds no connection at the end."""
    options = {"bind": cluster.primary.url, "replicas": [each.url for each in cluster.standbys], **options}
    pool = {"pool_size": CLIENTS, "max_overflow": 8, "pool_timeout": PATIENCE}
    made = SQLASessionMiddleware(app, engine_options=pool, **options)
    try:
        yield made
        assert {name: engine.pool.checkedout() for name, engine in made.engines.items()} == dict.fromkeys(
            ["default", *(f"replicas[{number}]" for number in range(len(options["replicas"])))], 0
        )
    finally:
        made.dispose()


class Logs:
    """What the servers were asked since this was made."""

    def __init__(self, cluster: Cluster) -> None:
        self._sizes = {id(node): node.log.stat().st_size for node in (cluster.primary, *cluster.standbys)}

    def of(self, node: Node) -> str:
        with node.log.open("rb") as log:
            log.seek(self._sizes[id(node)])
            return log.read().decode(errors="replace")

    def assert_only_read(self, *standbys: Standby) -> None:
        """Nothing that these were asked would write, and they have refused nothing because it would."""
        for standby in standbys:
            log = self.of(standby)
            assert [line for line in log.splitlines() if REFUSED.search(line) or "INSERT INTO" in line] == []
            # Were nothing logged, the rest would prove nothing. Each transaction that reads says so.
            assert "BEGIN READ ONLY" in log


def read(token: str) -> dict[str, Any]:
    """Which server has answered, and whether it has the row: by one statement, so by one server."""
    port, found = session.execute(select(func.inet_server_port(), exists().where(Row.token == token))).one()
    return {"port": port, "found": found}


def answer(start_response: StartResponse, page: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(page).encode()]


def store(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Stores a row at ``/write`` and ``/commit``, and looks for one at ``/read``."""
    path, token = environ["PATH_INFO"], environ["QUERY_STRING"]
    if path == "/read":
        return answer(start_response, read(token))
    session.add(Row(token=token))
    if path == "/commit":
        session.commit()
    return answer(start_response, "stored")


def look(client: Client, token: str = SEED, **options: Any) -> dict[str, Any]:
    """What a client gets to read."""
    response = client.get("/read", query_string=token, buffered=True, **options)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.get_json()
    return found


def cookie_name(app: SQLASessionMiddleware) -> str:
    """What the application calls its cookie."""
    assert app.routing is not None
    assert app.routing.replicas is not None
    return app.routing.replicas.cookie.name


def write(client: Client, path: str = "/write") -> str:
    """Store a row."""
    token = uuid4().hex
    response = client.post(path, query_string=token, buffered=True)
    assert (response.status_code, response.get_json()) == (200, "stored")
    return token


# Clients read what they wrote.


@pytest.mark.parametrize(
    ("path", "transaction"),
    [
        pytest.param("/write", True, id="the middleware commits"),
        pytest.param("/commit", False, id="the application commits"),
    ],
)
def test_clients_read_their_own_writes_when_a_standby_stands_still(
    cluster: Cluster, path: str, transaction: bool
) -> None:
    paused, running = cluster.standbys
    logs = Logs(cluster)
    start = threading.Barrier(CLIENTS)
    ended = threading.Event()

    with application(cluster, store, transaction=transaction, unavailable=True) as app:

        def write_and_read(client: Client) -> list[dict[str, Any]]:
            start.wait(PATIENCE)
            return [look(client, write(client, path)) for _ in range(PAIRS)]

        def only_read() -> list[int]:
            client = Client(app)
            seen = []
            while not ended.is_set() or len(seen) < 100:
                found = look(client)
                assert found["found"]
                seen.append(found["port"])
            return seen

        paused.pause_replay()
        clients = [Client(app) for _ in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS + 2) as threads:
            others = [threads.submit(only_read) for _ in range(2)]
            try:
                pairs = [pair for found in threads.map(write_and_read, clients) for pair in found]
            finally:
                ended.set()
            ports = Counter(port for other in others for port in other.result())

        assert [pair["found"] for pair in pairs] == [True] * CLIENTS * PAIRS
        assert {pair["port"] for pair in pairs} <= {cluster.primary.port, running.port}
        # Who has written nothing reads from either, however late it is.
        assert set(ports) == {paused.port, running.port}
        assert min(ports.values()) > sum(ports.values()) / 4
        # And the others from the standby that has what they wrote, rather than from the primary for ever.
        settle(cluster, running)
        assert {look(client)["port"] for client in clients} == {running.port}
        paused.resume_replay()
        settle(cluster, paused)
        assert {look(client)["port"] for client in clients * 2} == {running.port, paused.port}

    logs.assert_only_read(*cluster.standbys)
    assert logs.of(cluster.primary).count(f"INSERT INTO {Row.__tablename__}") == CLIENTS * PAIRS


def test_tenants_of_one_pool_read_their_own_rows_and_a_client_its_own_writes(cluster: Cluster) -> None:
    paused, running = cluster.standbys
    names = [f"t{uuid4().hex[:8]}" for _ in range(3)]
    cluster.primary.administer(*(f"CREATE SCHEMA {name} AUTHORIZATION outage" for name in names))
    tenants = TenantsMiddleware(
        store,
        cluster.primary.url,
        tenant="header:X-Tenant",
        known=names,
        schema="{tenant}",
        metadata=Base.metadata,
        replicas=[standby.url for standby in cluster.standbys],
        transaction=True,
    )

    def ask(client: Client, name: str, method: str, path: str, token: str) -> Any:
        headers = {"X-Tenant": name}
        response = client.open(path, method=method, query_string=token, headers=headers, buffered=True)
        assert response.status_code == 200, response.text
        return response.get_json()

    clients = {name: Client(tenants) for name in names}
    try:
        for name in names:
            tenants.init_database(name)
        settle(cluster, paused, running)
        paused.pause_replay()
        for name, client in clients.items():
            ask(client, name, "POST", "/write", name)
        settle(cluster, running)
        for name, client in clients.items():
            for token in names:
                # The position is in the server's log: it holds for the other tenants as well.
                own = {"port": running.port, "found": token == name}
                assert [ask(client, name, "GET", "/read", token) for _ in range(4)] == [own] * 4
        found = [ask(Client(tenants), names[0], "GET", "/read", names[0]) for _ in range(40)]
        # Who has written nothing reads from either, however late it is.
        assert {(each["port"], each["found"]) for each in found} == {(running.port, True), (paused.port, False)}
    finally:
        tenants.dispose()
        paused.resume_replay()
        cluster.primary.administer(*(f"DROP SCHEMA {name} CASCADE" for name in names))


def test_client_reads_its_own_write_when_that_was_a_get(cluster: Cluster) -> None:
    """However wrong that is of the application."""
    for standby in cluster.standbys:
        standby.pause_replay()
    with application(cluster, store, transaction=True) as app:
        client = Client(app)
        response = client.get("/write", query_string=(token := uuid4().hex), buffered=True)
        assert response.status_code == 200
        assert look(client, token) == {"port": cluster.primary.port, "found": True}


@pytest.mark.parametrize(
    ("work", "is_told"),
    [
        pytest.param(lambda: read(SEED), False, id="read"),
        pytest.param(lambda: session.connection().connection.cursor().execute("SELECT 1"), True, id="unseen"),
        pytest.param(lambda: session.execute(text("SELECT txid_current()")), True, id="function"),
        pytest.param(lambda: session.add(Row(token=uuid4().hex)), True, id="write"),
    ],
)
def test_client_of_a_post_is_told_of_what_may_have_been_written(
    cluster: Cluster, work: Callable[[], object], is_told: bool
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        return answer(start_response, "done")

    with application(cluster, app, transaction=True) as made:
        response = Client(made).post("/", buffered=True)
        assert (response.status_code, "Set-Cookie" in response.headers) == (200, is_told)


def test_client_reads_from_the_primary_for_a_while_when_only_the_time_of_its_write_is_known(cluster: Cluster) -> None:
    """As with each database that tells nothing of its log."""

    def commit_late(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/read":
            return answer(start_response, read(environ["QUERY_STRING"]))
        session.add(Row(token=environ["QUERY_STRING"]))
        session.flush()
        body = answer(start_response, "stored")
        session.commit()  # The head has left: it could not say where this would be.
        return body

    for standby in cluster.standbys:
        standby.pause_replay()
    with application(cluster, commit_late, read_your_writes=60) as app:
        name = cookie_name(app)
        client = Client(app)
        token = write(client)
        cookie = client.get_cookie(name)
        assert cookie is not None
        assert cookie.max_age is not None
        assert 60 <= cookie.max_age <= 62
        milliseconds = int(cookie.value)  # and no more
        for _ in range(10):
            assert look(client, token) == {"port": cluster.primary.port, "found": True}
        # A minute later.
        client.set_cookie(name, str(milliseconds - 60_000))
        found = look(client, token)
        assert found["port"] in {each.port for each in cluster.standbys}
        assert not found["found"]


def test_client_reads_its_own_write_when_a_later_one_has_told_no_position(cluster: Cluster) -> None:
    """The cookie of the later one takes the place of the first one's, and may not forget what that knew."""
    for standby in cluster.standbys:
        standby.pause_replay()
    with application(cluster, store, read_your_writes=60) as app:
        name = cookie_name(app)
        client = Client(app)
        token = write(client, "/commit")
        # It only reads, but its transaction is open as its head leaves: it could write yet.
        assert client.post("/read", query_string=token, buffered=True).get_json()["found"]
        cookie = client.get_cookie(name)
        assert cookie is not None
        milliseconds, position = cookie.value.split("+")
        # A minute later.
        client.set_cookie(name, f"{int(milliseconds) - 60_000}+{position}")
        assert look(client, token) == {"port": cluster.primary.port, "found": True}
        for standby in cluster.standbys:
            standby.resume_replay()
        settle(cluster, *cluster.standbys)
        assert look(client, token)["port"] in {each.port for each in cluster.standbys}
        # Within that minute nobody knows whether a standby has the later one.
        client.set_cookie(name, f"{milliseconds}+{position}")
        assert look(client, token) == {"port": cluster.primary.port, "found": True}


def test_client_reads_its_own_write_when_a_standby_has_lost_what_it_had(cluster: Cluster) -> None:
    """A standby that crashes begins again where it last made sure of its files, and that it had more is long known."""
    standby = cluster.standbys[0]
    with ExitStack() as stack:
        app = stack.enter_context(application(cluster, store, transaction=True, replicas=[standby.url]))
        client = Client(app)
        token = write(client)
        settle(cluster, standby)
        lsn = cluster.primary.lsn()
        assert look(client, token) == {"port": standby.port, "found": True}
        stack.callback(standby.administer, "ALTER SYSTEM RESET recovery_min_apply_delay", "SELECT pg_reload_conf()")
        standby.administer("ALTER SYSTEM SET recovery_min_apply_delay = '1h'")
        standby.stop(standby.crash)
        standby.start()
        assert standby.ask("SELECT pg_last_wal_replay_lsn() < CAST(:lsn AS pg_lsn)", lsn=lsn)
        assert look(client, token) == {"port": cluster.primary.port, "found": True}


# The cookie is anybody's to write.

MOST = 2**64 - 1

COOKIES = [
    # What cannot be read is as if it were not there.
    pytest.param("{name}", "replica", id="name only"),
    pytest.param("{name}=", "replica", id="empty"),
    pytest.param("{name}=.", "replica", id="point"),
    pytest.param("{name}=1.", "replica", id="no position"),
    pytest.param("{name}=.5", "replica", id="no time"),
    pytest.param(f"{{name}}=1.2.{MOST}", "replica", id="three numbers"),
    pytest.param(f"{{name}}=1.-{MOST}", "replica", id="negative position"),
    pytest.param(f"{{name}}=-1.{MOST}", "replica", id="negative time"),
    pytest.param(f"{{name}}=1.+{MOST}", "replica", id="sign"),
    pytest.param(f"{{name}}={'9' * 17}.{MOST}", "replica", id="time too long"),
    pytest.param(f"{{name}}=1.{'9' * 21}", "replica", id="position too long"),
    pytest.param(f"{{name}}={'9' * 100_000}", "replica", id="a hundred thousand digits"),
    pytest.param(f"{{name}}=1.{'9' * 100_000}", "replica", id="a hundred thousand digits of position"),
    pytest.param('{name}="1.5"', "replica", id="quoted"),
    pytest.param("{name}=1e15.1e15", "replica", id="exponents"),
    pytest.param("{name}=0x10.0x10", "replica", id="hexadecimal"),
    pytest.param("{name}=1_000.1_000", "replica", id="underscores"),
    pytest.param("{name}=nan.inf", "replica", id="no numbers"),
    pytest.param("{name}=１.٩٩٩", "replica", id="other digits"),
    pytest.param("{name}=²", "replica", id="superscript"),
    pytest.param("{name}=ünïcödé\U0001f36a", "replica", id="unicode"),
    pytest.param("{name}=\ud800", "replica", id="surrogate"),
    pytest.param(f"{{name}}=1.{MOST}\0", "replica", id="zero byte"),
    pytest.param("{name}=1.1'; DROP TABLE replicated; --", "replica", id="statement"),
    pytest.param("{name}=%31%2E%31", "replica", id="percent"),
    pytest.param("{name}={now}.12; {name", "replica", id="truncated position"),
    pytest.param(f"x{{name}}=1.{MOST}", "replica", id="longer name"),
    pytest.param(f"{{short}}=1.{MOST}", "replica", id="shorter name"),
    pytest.param(f"other={{name}}=1.{MOST}", "replica", id="in another one's value"),
    # What can be read is believed, and does no harm.
    pytest.param("{name}=0.0", "replica", id="zero"),
    pytest.param("{name}=9999999999999999", "replica", id="far future"),
    pytest.param("{name}={now}", "primary", id="now"),
    pytest.param(f"{{name}}=0.{MOST}", "primary", id="largest position"),
    pytest.param(f"{{name}}={{now}}.{'9' * 20}", "primary", id="larger than any position"),
    pytest.param(f"{{name}}={'9' * 16}.{2**63}", "primary", id="negative for a bigint"),
    # The last write counts.
    pytest.param(f"{{name}}=1.5; {{name}}=1.{MOST}", "primary", id="two, the last first"),
    pytest.param(f"{{name}}=1.{MOST}; {{name}}=1.5", "primary", id="two, the last last"),
    pytest.param(f"{{name}}=1.5;{{name}}=1.{MOST}", "primary", id="two without a space"),
    pytest.param(f"{{name}}=x; a=b; {{name}}=; {{name}}=1.{MOST}; c", "primary", id="among others"),
    pytest.param("{name}=1.5; " * 5000, "replica", id="five thousand"),
]


@pytest.fixture(scope="module")
def reader(running_cluster: Cluster) -> Iterator[SQLASessionMiddleware]:
    with application(running_cluster, store, transaction=True, unavailable=True) as app:
        yield app


@pytest.mark.parametrize(("cookie", "server"), COOKIES)
def test_client_gets_right_data_when_its_cookie_is_forged(
    cluster: Cluster, reader: SQLASessionMiddleware, cookie: str, server: str
) -> None:
    name = cookie_name(reader)
    raw = cookie.replace("{name}", name).replace("{short}", name[:-1])
    raw = raw.replace("{now}", str(int(time.time() * 1000)))
    # As a server hands on what is no ASCII (PEP 3333).
    environ = {"HTTP_COOKIE": raw.encode("utf-8", "surrogatepass").decode("latin-1")}
    found = look(Client(reader, use_cookies=False), environ_overrides=environ)
    ports = {"primary": {cluster.primary.port}, "replica": {each.port for each in cluster.standbys}}
    assert found["found"]
    assert found["port"] in ports[server]


# Which statements go where.


def act(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Does what the test says."""
    return answer(start_response, environ["tests.act"]())


@pytest.fixture(scope="module")
def actor(running_cluster: Cluster) -> Iterator[SQLASessionMiddleware]:
    """Nothing is committed, so nothing is left behind."""
    with application(running_cluster, act, unavailable=True) as app:
        yield app


def ask(app: SQLASessionMiddleware, what: Callable[[], Any], method: str = "GET") -> Any:
    response = Client(app).open("/", method=method, buffered=True, environ_overrides={"tests.act": what})
    assert response.status_code == 200, response.text
    return None if method == "HEAD" else response.get_json()


def port() -> int:
    found: int = session.scalars(select(func.inet_server_port())).one()
    return found


def seed() -> Row:
    return session.scalars(select(Row).where(Row.token == SEED)).one()


def new() -> str:
    return uuid4().hex


def other_table() -> Table:
    return Table("made_by_a_test", MetaData(), Column("id", Integer), prefixes=["TEMPORARY"])


NEXT = "nextval('replicated_id_seq')"
INSERT = "INSERT INTO replicated"

#: What has to be in the primary's log, and in no other's; and what is done.
WRITES: list[tuple[str, str, Callable[[], Any]]] = [
    ("flush", INSERT, lambda: (session.add(Row(token=new())), session.flush())),
    ("autoflush", INSERT, lambda: (session.add(Row(token=new())), seed())),
    ("flush of a change", "UPDATE replicated", lambda: (setattr(seed(), "token", new()), session.flush())),
    ("bulk", INSERT, lambda: session.bulk_save_objects([Row(token=new()), Row(token=new())])),
    ("query delete", "DELETE FROM noted", lambda: session.query(Note).delete()),
    ("insert", INSERT, lambda: session.execute(insert(Row).values(token=new()))),
    ("insert of many", INSERT, lambda: session.execute(insert(Row), [{"token": new()}, {"token": new()}])),
    ("insert returning", INSERT, lambda: session.scalars(insert(Row).values(token=new()).returning(Row)).one()),
    ("update", "UPDATE noted", lambda: session.execute(update(Note).values(row_id=Note.row_id))),
    ("delete", "DELETE FROM noted", lambda: session.execute(delete(Note))),
    ("table insert", INSERT, lambda: session.execute(Row.__table__.insert().values(token=new()))),
    ("lambda insert", INSERT, lambda: session.execute(lambda_stmt(lambda: insert(Row)), {"token": new()})),
    ("text insert", INSERT, lambda: session.execute(text(f"{INSERT} (token) VALUES (:token)"), {"token": new()})),
    ("text update", "UPDATE noted", lambda: session.execute(text("\n  UPDATE noted SET row_id = row_id"))),
    ("text delete", "delete from noted", lambda: session.execute(text("delete from noted"))),
    ("text after a select", "delete from noted", lambda: session.execute(text("SELECT 1; delete from noted"))),
    ("text with a comment", "delete from noted", lambda: session.execute(text("/* SELECT */ delete from noted"))),
    ("text explain analyze", "DELETE", lambda: session.execute(text("EXPLAIN (ANALYZE) DELETE FROM noted"))),
    (
        "text returning",
        "DELETE FROM noted",
        lambda: session.execute(text("DELETE FROM noted RETURNING id").columns(id=Integer)),
    ),
    (
        "text returning entities",
        "DELETE FROM noted",
        lambda: session.scalars(select(Note).from_statement(text("DELETE FROM noted RETURNING *"))).all(),
    ),
    (
        "text with columns, returning entities",
        "DELETE FROM noted",
        lambda: session.scalars(
            select(Note).from_statement(text("DELETE FROM noted RETURNING id, row_id").columns(Note.id, Note.row_id))
        ).all(),
    ),
    (
        "insert returning entities",
        INSERT,
        lambda: session.scalars(select(Row).from_statement(insert(Row).values(token=new()).returning(Row))).all(),
    ),
    ("ddl", "CREATE TEMPORARY", lambda: session.execute(CreateTable(other_table()))),
    ("text ddl", "CREATE TEMPORARY", lambda: session.execute(text("CREATE TEMPORARY TABLE made (id int)"))),
    ("create_all", "CREATE TEMPORARY", lambda: other_table().create(session.connection())),
    ("text select into", "INTO", lambda: session.execute(text("SELECT 1 AS one INTO TEMPORARY made"))),
    ("lock table", "LOCK TABLE", lambda: session.execute(text("LOCK TABLE noted IN SHARE MODE"))),
    ("for update", "FOR UPDATE", lambda: session.execute(select(Row).with_for_update())),
    ("for share", "FOR SHARE", lambda: session.execute(select(Row.id).with_for_update(read=True))),
    ("for key share", "FOR KEY SHARE", lambda: session.execute(select(Row).with_for_update(read=True, key_share=True))),
    ("for update in a subquery", "FOR UPDATE", lambda: select_from(select(Row.id).with_for_update().subquery())),
    ("for update in a cte", "FOR UPDATE", lambda: select_from(select(Row.id).with_for_update().cte())),
    ("for update as a suffix", "FOR UPDATE", lambda: session.execute(select(Row.id).suffix_with("FOR UPDATE"))),
    ("lambda for update", "FOR UPDATE", lambda: session.execute(lambda_stmt(lambda: select(Row).with_for_update()))),
    ("query for update", "FOR UPDATE", lambda: session.query(Row).with_for_update().all()),
    ("get for update", "FOR UPDATE", lambda: session.get(Row, 1, with_for_update=True)),
    ("refresh for update", "FOR UPDATE", lambda: session.refresh(seed(), with_for_update=True)),
    ("text for update", "FOR UPDATE", lambda: session.execute(text("SELECT id FROM replicated FOR UPDATE"))),
    ("text for share", "for no key", lambda: session.execute(text("select id from replicated for no key update"))),
    (
        "insert in a cte",
        INSERT,
        lambda: select_from(insert(Row).values(token=new()).returning(Row.id).cte()),
    ),
    (
        "insert in a cte beside",
        INSERT,
        lambda: session.execute(select(Note.id).add_cte(insert(Row).values(token=new()).cte("stored"))),
    ),
    (
        "delete in a cte of a lambda",
        "DELETE FROM noted",
        lambda: session.execute(lambda_stmt(lambda: select(delete(Note).returning(Note.id).cte().c.id))),
    ),
    (
        "text in a cte",
        "DELETE FROM noted",
        lambda: select_from(text("DELETE FROM noted RETURNING id").columns(id=Integer).cte("gone")),
    ),
    (
        "text with",
        "DELETE FROM noted",
        lambda: session.execute(text("WITH gone AS (DELETE FROM noted RETURNING id) SELECT * FROM gone")),
    ),
    ("sequence", "nextval", lambda: session.scalar(Sequence("replicated_id_seq"))),
    ("next_value", "nextval", lambda: session.scalar(select(Sequence("replicated_id_seq").next_value()))),
    ("nextval", "nextval", lambda: session.scalar(select(func.nextval("replicated_id_seq")))),
    ("nextval of a schema", "nextval", lambda: session.scalar(select(func.pg_catalog.nextval("replicated_id_seq")))),
    ("nextval alone", "nextval", lambda: session.scalar(func.nextval("replicated_id_seq"))),
    ("nextval deep", "nextval", lambda: session.scalar(select(Row.id).where(Row.id < func.nextval("noted_id_seq")))),
    ("nextval literally", "nextval", lambda: session.scalar(select(literal_column(NEXT)))),
    ("nextval as text in a select", "nextval", lambda: session.scalar(select(text(NEXT)))),
    ("text nextval", "nextval", lambda: session.scalar(text(f"SELECT {NEXT}"))),
    ("advisory lock", "pg_advisory", lambda: session.scalar(select(func.pg_advisory_xact_lock(1)))),
    ("text notify", "NOTIFY", lambda: session.execute(text("NOTIFY tests"))),
    ("on_primary", "BEGIN", on_primary),
    ("connection", "'here'", lambda: session.connection().execute(text("SELECT 'here'"))),
    ("savepoint", "SAVEPOINT", lambda: (session.begin_nested(), seed())),
]


def select_from(source: Any) -> None:
    session.execute(select(source.c.id)).all()


def assert_heard_by_primary_alone(logs: Logs, cluster: Cluster, words: str) -> None:
    assert words in logs.of(cluster.primary)
    for standby in cluster.standbys:
        heard = logs.of(standby)
        assert REFUSED.search(heard) is None
        assert words == "BEGIN" or words not in heard


@pytest.mark.parametrize(("words", "what"), [pytest.param(words, what, id=name) for name, words, what in WRITES])
def test_request_moves_to_the_primary_when_a_get_does_more_than_read(
    cluster: Cluster, actor: SQLASessionMiddleware, words: str, what: Callable[[], Any]
) -> None:
    """With the statement itself, and for all that it reads afterwards."""

    def move() -> list[int]:
        before = port()
        what()
        # More than a port: here is what has just been written.
        return [before, port(), session.scalar(text("SELECT inet_server_port()")), port()]

    logs = Logs(cluster)
    before, *after = ask(actor, move)
    assert before in {each.port for each in cluster.standbys}
    assert after == [cluster.primary.port] * 3
    assert_heard_by_primary_alone(logs, cluster, words)


def test_request_moves_to_the_primary_when_a_get_binds_a_statement_to_it(
    cluster: Cluster, actor: SQLASessionMiddleware
) -> None:
    def move() -> list[int]:
        here = session.scalar(text("SELECT inet_server_port()"), bind_arguments={"bind": actor.engine})
        return [here, port()]

    assert ask(actor, move) == [cluster.primary.port] * 2


def test_request_is_still_on_the_primary_when_a_get_has_committed_its_write(
    cluster: Cluster, actor: SQLASessionMiddleware
) -> None:
    for standby in cluster.standbys:
        standby.pause_replay()

    def move() -> list[Any]:
        token = new()
        session.add(Row(token=token))
        session.commit()
        found = read(token)
        session.rollback()
        again = read(token)
        session.remove()
        return [found, again, read(token)]

    assert ask(actor, move) == [{"port": cluster.primary.port, "found": True}] * 3


READS: list[tuple[str, Callable[[], Any]]] = [
    ("entities", lambda: session.scalars(select(Row)).all()),
    ("get", lambda: session.get(Row, 1)),
    ("query", lambda: session.query(Row).filter_by(token=SEED).count()),
    ("columns", lambda: session.execute(select(Row.token, Note.id).join(Note)).all()),
    ("table", lambda: session.execute(Row.__table__.select()).all()),
    ("refresh", lambda: session.refresh(seed())),
    ("lazy load", lambda: seed().notes[0].id),
    ("expired attribute", lambda: (found := seed(), session.expire(found), found.token)),
    ("lambda", lambda: session.execute(lambda_stmt(lambda: select(Row))).all()),
    ("in batches", lambda: list(session.scalars(select(Row).execution_options(yield_per=2)))),
    ("union", lambda: session.execute(select(Row.__table__.c.id).union(select(Note.__table__.c.id))).all()),
    ("subquery", lambda: select_from(select(Row.id).subquery())),
    ("cte", lambda: select_from(select(Row.id).cte())),
    ("function", lambda: session.scalar(select(func.count()).select_from(Row))),
    ("text", lambda: session.execute(text("SELECT id FROM replicated")).all()),
    ("text in lines", lambda: session.execute(text("\n  select id\n  from replicated;\n")).all()),
    ("text with", lambda: session.execute(text("WITH found AS (SELECT 1 AS id) SELECT id FROM found")).all()),
    ("text values", lambda: session.execute(text("VALUES (1), (2)")).all()),
    ("text table", lambda: session.execute(text("TABLE replicated")).all()),
    ("text show", lambda: session.scalar(text("SHOW server_version"))),
    ("text explain", lambda: session.execute(text("EXPLAIN SELECT id FROM replicated")).all()),
    ("text of entities", lambda: session.scalars(select(Row).from_statement(text("SELECT * FROM replicated"))).all()),
    ("text in a subquery", lambda: select_from(text("SELECT id FROM noted").columns(id=Integer).subquery())),
    ("commit", lambda: session.commit()),
    ("rollback", lambda: session.rollback()),
    ("remove", lambda: session.remove()),
    ("begun", lambda: (session.rollback(), session.begin())),
]


@pytest.mark.parametrize("what", [pytest.param(what, id=name) for name, what in READS])
def test_request_stays_on_one_replica_when_a_get_only_reads(
    cluster: Cluster, actor: SQLASessionMiddleware, what: Callable[[], Any]
) -> None:
    def stay() -> list[int]:
        before = port()
        what()
        return [before, port(), session.scalar(text("SELECT inet_server_port()"))]

    logs = Logs(cluster)
    # More than once, as the other replica is as good for the next request.
    for _ in range(4):
        ports = ask(actor, stay)
        assert len(set(ports)) == 1
        assert ports[0] in {each.port for each in cluster.standbys}
    assert "execute" not in logs.of(cluster.primary)
    assert "statement" not in logs.of(cluster.primary)


@pytest.mark.parametrize(
    ("method", "server"),
    [("HEAD", "replica"), ("OPTIONS", "replica"), *((each, "primary") for each in ("POST", "PUT", "PATCH", "DELETE"))],
)
def test_request_reads_from_the_primary_when_its_method_is_not_safe(
    cluster: Cluster, actor: SQLASessionMiddleware, method: str, server: str
) -> None:
    ports: list[int] = []
    ask(actor, lambda: ports.append(port()), method)
    assert (ports[0] == cluster.primary.port) == (server == "primary")


# Servers go away, and come back.


@dataclass(frozen=True)
class Answer:
    """What a client got.

    :param asked: and answered: by the clock that :func:`time.monotonic` reads.
    :param what: "write", "read", or "read own" of a row that the client has just stored.
    :param kind: "ok", "unavailable", "unknown" (whether it was stored), or what else it was.
    :param port: of the server that was read from.
    """

    client: int
    asked: float
    answered: float
    what: str
    kind: str
    port: int | None


class Load:
    """Clients of which one half only reads, and the other half writes as well, until they are told to stop."""

    def __init__(self, app: SQLASessionMiddleware, clients: int = 8) -> None:
        self.app = app
        self.answers: list[Answer] = []
        self.readers = range(0, clients, 2)
        self.writers = range(1, clients, 2)
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        client = Client(self.app)
        while not self._ending.is_set():
            token = new()
            if number in self.writers and self._ask(client, number, "write", token) == "ok":
                self._ask(client, number, "read own", token)
            else:
                self._ask(client, number, "read", SEED)

    def _ask(self, client: Client, number: int, what: str, token: str) -> str:
        asked = time.monotonic()
        port = None
        path, method = ("/write", "POST") if what == "write" else ("/read", "GET")
        try:
            response = client.open(path, method=method, query_string=token, buffered=True)
        except Exception as error:
            kind = repr(error)
        else:
            kind = {
                (200, None): "ok",
                (503, "7"): "unavailable",
                (500, None): "unknown" if "not known" in response.text else "error",
            }.get((response.status_code, response.headers.get("Retry-After")), response.status)
            if kind == "ok" and what != "write":
                found = response.get_json()
                port = found["port"]
                kind = "ok" if found["found"] else "missing"
        self.answers.append(Answer(number, asked, time.monotonic(), what, kind, port))
        return kind

    def between(self, moment: float, until: float = float("inf")) -> list[Answer]:
        """The answers to what was asked and answered in between."""
        return [answer for answer in tuple(self.answers) if answer.asked > moment and answer.answered < until]

    def ports(self, clients: Iterable[int], moment: float, until: float = float("inf")) -> set[int | None]:
        """Of the servers that these clients have read from in between."""
        return {
            answer.port
            for answer in self.between(moment, until)
            if answer.client in clients and answer.port is not None
        }

    def wait_for(self, clients: Iterable[int], moment: float, what: str, kind: str, port: int | None = None) -> None:
        """Return when each of these clients has had several such answers since then."""
        deadline = time.monotonic() + PATIENCE
        while True:
            had = Counter(
                answer.client
                for answer in self.between(moment)
                if answer.what.startswith(what) and answer.kind == kind and port in (None, answer.port)
            )
            if all(had[client] >= 5 for client in clients):
                return
            assert time.monotonic() < deadline, f"no {kind!r} {what} from {port}: {self.between(moment)[-5:]}"
            time.sleep(0.01)


def test_client_that_wrote_goes_on_reading_when_a_standby_is_gone(cluster: Cluster) -> None:
    """Whether it is gone is found out by asking it how far it is."""
    gone, left = cluster.standbys
    with application(cluster, store, transaction=True, unavailable=True, replica_retry=0) as app:
        client = Client(app)
        token = write(client)
        settle(cluster, gone, left)
        gone.stop(gone.crash)
        for _ in range(10):
            assert look(client, token) == {"port": left.port, "found": True}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("attempts", [1, 2])
def test_nobody_is_in_doubt_of_a_write_when_it_is_a_replica_that_goes_away(
    cluster: Cluster, attempts: int, writes: bool
) -> None:
    """At the end of a transaction in which nothing was written there."""
    servers = {standby.port: standby for standby in cluster.standbys}
    calls = []
    token = new()

    def read_and_cut() -> str:
        number, backend = session.execute(select(func.inet_server_port(), func.pg_backend_pid())).one()
        if writes:
            session.add(Row(token=token))
            session.flush()
        if not calls:
            assert servers[number].ask("SELECT pg_terminate_backend(:backend, 5000)", backend=backend)
        calls.append(number)
        return "done"

    with application(cluster, act, transaction={"attempts": attempts, "backoff_base": 0}, unavailable=True) as app:
        response = Client(app).get("/", buffered=True, environ_overrides={"tests.act": read_and_cut})
    with Session(create_engine(cluster.primary.url, poolclass=NullPool)) as asking:
        stored = asking.scalar(select(exists().where(Row.token == token)))
    assert "not known" not in response.text
    assert response.status_code in ((200, 503) if attempts == 1 else (200,))
    assert stored == (writes and response.status_code == 200)


@pytest.mark.parametrize("how", ["shutdown", "crash"])
@pytest.mark.parametrize("attempts", [1, 4])
def test_no_read_fails_when_the_standbys_go_away_under_load(
    cluster: Cluster, attempts: int, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """But for those that a standby was working on as it went, where they are not repeated."""
    caplog.set_level("WARNING", "sqlasession_middleware.replicas")
    primary = cluster.primary
    first, second = cluster.standbys
    logs = Logs(cluster)
    ends = []

    def stop(standby: Standby) -> float:
        begun = time.monotonic()
        standby.stop(getattr(standby, how))
        ended = time.monotonic()
        ends.append((begun, ended))
        return ended

    with application(
        cluster,
        store,
        # More than two: those whose server is about to go may meet another connection to it that has yet to break.
        transaction={"attempts": attempts, "backoff_base": 0.05},
        unavailable={"retry_after": 7},
        replica_retry=0.2,
    ) as app:
        with Load(app) as load:
            for standby in cluster.standbys:
                load.wait_for(load.readers, 0, "read", "ok", standby.port)
            load.wait_for(load.writers, 0, "read own", "ok")

            one_left = stop(first)
            load.wait_for([*load.readers, *load.writers], one_left, "read", "ok")
            load.wait_for(load.readers, one_left, "read", "ok", second.port)

            none_left = stop(second)
            load.wait_for([*load.readers, *load.writers], none_left, "read", "ok", primary.port)

            starting = time.monotonic()
            first.start()
            back = time.monotonic()
            load.wait_for(load.readers, back, "read", "ok", first.port)
            again = time.monotonic()
            load.wait_for(load.readers, again, "read", "ok", first.port)
        assert load.ports(load.readers, one_left, ends[1][0]) == {second.port}
        assert load.ports(load.writers, one_left, ends[1][0]) <= {second.port, primary.port}
        assert load.ports([*load.readers, *load.writers], none_left, starting) == {primary.port}
        assert load.ports(load.readers, again) == {first.port}

        failed = [answer for answer in load.answers if answer.kind != "ok"]
        if attempts == 1:
            in_flight = [
                answer
                for answer in failed
                if answer.kind == "unavailable"
                and answer.what != "write"
                and any(answer.asked < ended and answer.answered > begun for begun, ended in ends)
            ]
            # No more than one for each client and each end.
            assert len(in_flight) <= 2 * (len(load.readers) + len(load.writers))
            assert failed == in_flight
        else:
            assert failed == []
    logs.assert_only_read(first, second)
    said = [record.getMessage() for record in caplog.records if record.name == "sqlasession_middleware.replicas"]
    for standby in cluster.standbys:
        assert any(f":{standby.port}/" in line and "is out of reach" in line for line in said)
    assert any(f":{first.port}/" in line and "is reachable again" in line for line in said)


def test_reads_go_on_and_writes_find_the_new_primary_when_a_standby_is_promoted() -> None:
    """Each by its URL: with several hosts it finds the new primary, with one it waits for the old one."""
    with ExitStack() as stack:
        cluster = stack.enter_context(replicated())
        prepare(cluster)
        primary = cluster.primary
        gone, left = cluster.standbys
        hosts = [f"127.0.0.1:{each.port}" for each in (primary, left)]
        several: URL = primary.url.set(host=None, port=None).update_query_dict(
            {"host": hosts, "target_session_attrs": "read-write"}
        )
        # Without a breaker: the first request that asks after the promotion has to find the new primary.
        options = {
            "unavailable": {"retry_after": 7, "breaker_failures": 0},
            "transaction": True,
            "replica_retry": 0.2,
        }
        one_host, many_hosts = (
            # What a promoted standby has of a client's writes is no more known but by the time.
            stack.enter_context(application(cluster, store, **options, bind=bind, read_your_writes=0.2))
            for bind in (primary.url, several)
        )
        settled = Client(one_host)
        token = write(settled)
        settle(cluster, gone, left)
        with Load(one_host, 4) as one, Load(many_hosts, 4) as many:
            loads = (one, many)
            for load in loads:
                load.wait_for(load.writers, 0, "write", "ok")
                load.wait_for(load.readers, 0, "read", "ok", gone.port)
            gone.stop(gone.crash)
            primary.stop(primary.crash)
            down = time.monotonic()
            for load in loads:
                load.wait_for(load.readers, down, "read", "ok", left.port)
                load.wait_for(load.writers, down, "write", "unavailable")
            assert look(settled, token) == {"port": left.port, "found": True}

            promoting = time.monotonic()
            left.promote()
            promoted = time.monotonic()
            for load in loads:
                load.wait_for([*load.readers, *load.writers], promoted, "read", "ok", left.port)
            one.wait_for(one.writers, promoted, "write", "unavailable")
            many.wait_for(many.writers, promoted, "read own", "ok", left.port)
            assert look(settled, token) == {"port": left.port, "found": True}

        for load in loads:
            reads = [answer for answer in load.between(down) if answer.client in load.readers]
            assert {(answer.kind, answer.port) for answer in reads} == {("ok", left.port)}
            writes = [answer for answer in load.between(down, promoting) if answer.what == "write"]
            assert {answer.kind for answer in writes} == {"unavailable"}
        assert {answer.kind for answer in one.between(down) if answer.what == "write"} == {"unavailable"}
        # Whatever became of the servers, nobody was told anything wrong; and who has only read, no more than to wait.
        everything = [*one.answers, *many.answers]
        assert {answer.kind for answer in everything if answer.what != "write"} <= {"ok", "unavailable"}
        assert {answer.kind for answer in everything if answer.what == "write"} <= {"ok", "unavailable", "unknown"}
        # It is found by the first request that asks after the end of the promotion.
        assert {answer.kind for answer in many.between(promoted) if answer.what != "read"} == {"ok"}

        configured = stack.enter_context(application(cluster, store, **options, bind=left.url))
        client = Client(configured)
        assert look(client, write(client)) == {"port": left.port, "found": True}
