"""Several databases in one application: each table's statements go to its own (G14)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    create_engine,
    delete,
    exists,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)  # fmt: skip
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, column_property, mapped_column
from sqlalchemy.schema import CreateIndex, CreateSequence, CreateTable, DropTable
from sqlalchemy.sql.expression import true
from sqlalchemy.sql.functions import FunctionElement

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database.binds import key_of_mapper, key_of_statement
from sqlasession_middleware.errors import ConfigurationError

from .wsgi import assert_given_back, consume, environ, start_response

audit = MetaData(info={"bind_key": "audit"})
main = MetaData()
entry = Table("entry", audit, Column("id", Integer, primary_key=True), Column("note", String(20), index=True))
log = Table("log", audit, Column("id", Integer, primary_key=True))
numbers = Sequence("numbers", metadata=audit)
#: Flask-SQLAlchemy's older way.
visit = Table("visit", main, Column("id", Integer, primary_key=True), info={"bind_key": "stats"})
goods = Table("goods", main, Column("id", Integer, primary_key=True), Column("name", String(20)))


class Chosen(DeclarativeBase):
    pass


class Choice(Chosen):
    __tablename__ = "choice"
    id: Mapped[int] = mapped_column(primary_key=True)


class Audited(DeclarativeBase):
    metadata = audit


class Document(Audited):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "document"}  # noqa: RUF012


class Letter(Document):
    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(ForeignKey("document.id"), primary_key=True)
    text: Mapped[str] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_identity": "letter"}  # noqa: RUF012


class Note(Document):
    __mapper_args__ = {"polymorphic_identity": "note"}  # noqa: RUF012


def application(environ, start_response):
    session.add_all([Letter(text="dear"), Note()])
    session.execute(insert(goods).values(name="tea"))
    session.execute(insert(entry).values(note="sold"))
    session.execute(insert(visit).values(id=7))
    session.commit()
    start_response("200 OK", [])
    return [b"stored"]


@pytest.fixture
def app(tmp_path) -> Iterator[SQLASessionMiddleware]:
    app = SQLASessionMiddleware(
        application,
        f"sqlite:///{tmp_path}/main.db",
        binds={"audit": f"sqlite:///{tmp_path}/audit.db", "stats": {"url": "sqlite://", "echo": False}},
        metadata=[main, audit],
    )
    app.init_database()
    yield app
    app.dispose()


def rows(app: SQLASessionMiddleware, name: str, statement: str) -> list[object]:
    with app.engines[name].connect() as connection:
        return list(connection.execute(text(statement)).scalars())


def test_each_table_is_on_its_own_engine(app):
    tables = {name: set(inspect(engine).get_table_names()) for name, engine in app.engines.items()}
    assert tables == {"default": {"goods"}, "audit": {"entry", "document", "letter", "log"}, "stats": {"visit"}}


def test_each_statement_finds_its_engine(app):
    assert consume(app(environ("POST"), start_response)) == b"stored"
    assert rows(app, "default", "SELECT name FROM goods") == ["tea"]
    assert rows(app, "audit", "SELECT note FROM entry") == ["sold"]
    assert rows(app, "audit", "SELECT text FROM letter") == ["dear"]
    assert rows(app, "audit", "SELECT kind FROM document ORDER BY kind") == ["letter", "note"]
    assert rows(app, "stats", "SELECT id FROM visit") == [7]
    for engine in app.engines.values():
        assert_given_back(engine)


def test_what_is_not_committed_is_rolled_back_everywhere(app):
    with app.context():
        session.add(Note())
        session.execute(insert(goods).values(name="tea"))
        session.flush()
    assert (
        rows(app, "default", "SELECT count(*) FROM goods") == rows(app, "audit", "SELECT count(*) FROM document") == [0]
    )


@pytest.mark.parametrize("before", ["nothing", "a read"])
def test_savepoint_of_another_database_is_inside_of_its_transaction(app, before):
    """SQLite would take a SAVEPOINT without a BEGIN for the transaction, and its RELEASE for the COMMIT."""
    with app.context():
        if before == "a read":
            session.execute(select(entry)).all()
        with session.begin_nested():
            session.execute(insert(goods).values(name="tea"))
            session.execute(insert(entry).values(note="sold"))
            with session.begin_nested():
                session.execute(insert(visit).values(id=7))
        session.rollback()
        assert session.execute(select(entry)).all() == []
    assert rows(app, "default", "SELECT name FROM goods") == []
    assert rows(app, "audit", "SELECT note FROM entry") == []
    assert rows(app, "stats", "SELECT id FROM visit") == []


def test_text_goes_where_its_bind_arguments_say(app):
    with app.context():
        for arguments, table in (
            ({"mapper": Letter}, "letter"), ({"clause": entry}, "entry"), ({"bind_key": "audit"}, "letter"),
            ({"bind": app.engines["audit"]}, "letter"), ({"bind_key": "default"}, "goods"), ({}, "goods"),
            ({"bind_key": "stats"}, "visit"),
        ):  # fmt: skip
            found = session.execute(text(f"SELECT count(*) FROM {table}"), bind_arguments=arguments)
            assert found.scalar_one() == 0
        connection = session.connection(bind_arguments={"bind_key": "audit"})
        assert connection.engine is app.engines["audit"]


CLAUSES = {
    "table": entry,
    "select": select(entry),
    "column": select(entry.c.note),
    "function of a column": select(func.max(entry.c.note)),
    "count": select(func.count()).select_from(entry),
    "alias": select(entry.alias()),
    "join": select(entry.alias().join(entry.alias("other"), true())),
    "subquery": select(select(entry).subquery()),
    "scalar subquery": select(select(entry.c.note).scalar_subquery()),
    "cte": select(select(entry).cte()),
    "exists": exists().where(entry.c.id == 1).select(),
    "union": select(entry).union(select(entry)),
    "insert": insert(entry),
    "insert from another's rows": insert(entry).from_select(["id"], select(goods.c.id)),
    "update": update(entry),
    "delete": delete(entry),
    "create table": CreateTable(entry),
    "drop table": DropTable(entry),
    "create index": CreateIndex(next(iter(entry.indexes))),
    "sequence": numbers,
    "create sequence": CreateSequence(numbers),
    "next value": select(numbers.next_value()),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAUSES)
def test_core_statement(name):
    assert key_of_statement(CLAUSES[name]) == "audit"


@pytest.mark.parametrize("mapper", [Document, Letter, Note, inspect(Letter), aliased(Letter)])
def test_mapper(mapper):
    assert key_of_mapper(mapper) == "audit"


@pytest.mark.parametrize(
    "clause", [None, text("SELECT 1"), select(goods), insert(goods).from_select(["id"], select(entry.c.id)), func.now()]
)
def test_everything_else_is_the_default_engines(clause):
    assert key_of_statement(clause) is None


def test_mapped_to_a_join_or_subquery():
    class Base(DeclarativeBase):
        metadata = MetaData()

    class Joined(Base):
        __table__ = entry.join(log, entry.c.id == log.c.id)
        id = column_property(entry.c.id, log.c.id)

    class Selected(Base):
        __table__ = select(entry).subquery()
        __mapper_args__ = {"primary_key": [__table__.c.id]}  # noqa: RUF012

    assert key_of_mapper(Joined) == key_of_mapper(Selected) == "audit"


def test_lazy_load_and_refresh(app):
    with app.context():
        letter = Letter(text="dear")
        session.add(letter)
        session.commit()
        assert letter.text == "dear"  # expired by the commit
        session.refresh(letter)
        assert session.get(Document, letter.id) is letter


def flush(app, model):
    session.add(model(id=1))
    session.flush()


USES = {
    "statement": lambda app, model: session.execute(select(model.__table__)),
    "flush": flush,
    "bind_arguments": lambda app, model: session.execute(text("SELECT 1"), bind_arguments={"bind_key": "audti"}),
    "init_database": lambda app, model: app.init_database(),
    "drop_database": lambda app, model: app.drop_database(),
}


@pytest.mark.parametrize("use", USES)
def test_unknown_bind_key_is_an_error_that_lists_the_known_ones(app, use):
    wrong = MetaData(info={"bind_key": "audti"})
    table = Table("lost", wrong, Column("id", Integer, primary_key=True))
    lost = type("Lost", (DeclarativeBase,), {"metadata": wrong})
    model = type("Model", (lost,), {"__table__": table})
    other = SQLASessionMiddleware(
        application, app.engine, binds={name: app.engines[name] for name in ("audit", "stats")}, metadata=[main, wrong]
    )
    with other.context(), pytest.raises(UnboundExecutionError, match=r"'audti'.*'audit', 'stats'.*mean 'audit'"):
        USES[use](other, model)


class Answer(FunctionElement[int]):
    """An expression that knows how often it was compiled."""

    inherit_cache = True
    type = Integer()
    compiled = 0


@compiles(Answer)
def compile_answer(element: Answer, compiler: object, **more: object) -> str:
    Answer.compiled += 1
    return "42"


def test_a_statement_of_a_bind_is_compiled_once(app):
    Answer.compiled = 0
    with app.context():
        for _ in range(3):
            assert session.execute(select(entry.c.id, Answer())).all() == []
    assert Answer.compiled == 1


def test_each_application_does_not_make_a_class_of_sessions():
    kinds = set()
    for _ in range(2):
        app = SQLASessionMiddleware(application, "sqlite://", binds={"audit": "sqlite://"})
        with app.context():
            kinds.add(type(session()))
        app.dispose()
    assert len(kinds) == 1


class AskingSession(Session):
    """Executes something while it is made."""

    def __init__(self, **options):
        super().__init__(**options)
        self.found = self.scalars(select(text("42"))).one()


def test_class_of_the_user_may_execute_while_it_is_made():
    app = SQLASessionMiddleware(
        application, "sqlite://", binds={"audit": "sqlite://"}, session_options={"class_": AskingSession}
    )
    with app.context():
        assert session().found == 42
    app.dispose()


def test_without_binds_a_bind_key_is_an_error_where_tables_are_created(sqlite_url):
    app = SQLASessionMiddleware(application, sqlite_url, metadata=audit)
    with pytest.raises(UnboundExecutionError, match=r"'audit'.*there are: none"):
        app.init_database()


def test_drop_database(app):
    app.drop_database()
    assert [inspect(engine).get_table_names() for engine in app.engines.values()] == [[], [], []]


def test_sequences_and_indexes_of_a_metadata_are_created_with_it():
    collection = MetaData(info={"bind_key": "audit"})
    Table("t", collection, Column("id", Integer, primary_key=True), Column("x", Integer), Index("t_x", "x"))
    app = SQLASessionMiddleware(application, "sqlite://", binds={"audit": "sqlite://"}, metadata=collection)
    app.init_database()
    assert [index["name"] for index in inspect(app.engines["audit"]).get_indexes("t")] == ["t_x"]
    app.dispose()


def test_given_engine_is_not_disposed_of(sqlite_engine):
    app = SQLASessionMiddleware(application, "sqlite://", binds={"audit": sqlite_engine})
    pool = sqlite_engine.pool
    app.dispose()
    assert app.engines["audit"] is sqlite_engine
    assert sqlite_engine.pool is pool


def test_each_bind_has_a_connection_of_its_own(tmp_path):
    app = SQLASessionMiddleware(
        application, f"sqlite:///{tmp_path}/a.db", binds={"audit": "sqlite://"}, session_options={"twophase": False}
    )
    with app.context() as opened:
        assert opened.connection() is not opened.connection(bind_arguments={"bind_key": "audit"})
    app.dispose()


def test_session_class_with_a_choice_of_its_own(tmp_path):
    """What it decides stands, and what it leaves to SQLAlchemy is the application's default engine."""
    special = create_engine("sqlite://")

    class Choosy(Session):
        def get_bind(self, mapper=None, *, clause=None, **more):
            if clause is goods:
                return special
            return super().get_bind(mapper, clause=clause, **more)

    app = SQLASessionMiddleware(
        application, f"sqlite:///{tmp_path}/a.db", binds={"audit": "sqlite://"}, session_options={"class_": Choosy},
        replicas=[f"sqlite:///{tmp_path}/r.db"],
    )  # fmt: skip
    with app.context() as opened:
        assert opened.get_bind(clause=goods) is special
        assert opened.get_bind(clause=entry) is app.engines["audit"]
        assert opened.get_bind(clause=select(goods)) is app.engine
    app.dispose()
    special.dispose()


def test_without_binds_a_bind_key_is_for_the_session_class(tmp_path):
    special = create_engine("sqlite://")
    chosen = []

    class Keyed(Session):
        def get_bind(self, mapper=None, *, clause=None, **more):
            return special if clause is entry else super().get_bind(mapper, clause=clause, **more)

    def choose(environ, start_response):
        chosen.extend(session.get_bind(clause=table) for table in (entry, goods))
        start_response("200 OK", [])
        return [b""]

    app = SQLASessionMiddleware(
        choose, f"sqlite:///{tmp_path}/a.db", replicas=[f"sqlite:///{tmp_path}/a.db"], session_options={"class_": Keyed}
    )
    consume(app(environ(), start_response))
    assert chosen == [special, app.engine]
    app.dispose()
    special.dispose()


def test_sessions_own_bind(tmp_path):
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    app = SQLASessionMiddleware(application, f"sqlite:///{tmp_path}/a.db", binds={"audit": "sqlite://"})
    with app.context() as opened:
        opened().bind_table(goods, other)
        assert opened.get_bind(clause=select(goods)) is other
        opened().bind_mapper(Choice, other)
        assert opened.get_bind(Choice) is other
        assert opened.get_bind(clause=select(entry)) is app.engines["audit"]
    with app.context(), app.new_session(bind=other) as opened:
        assert opened.get_bind() is other
    app.dispose()
    other.dispose()


MISTAKES = {
    "no dict": ("sqlite://", r"binds must be a dict of databases by their bind keys, got str\."),
    "no name": ({"": "sqlite://"}, r"binds must have names as keys, got ''\."),
    "URL as a name": ({"sqlite://u:secret@h": "sqlite://"}, r"binds must have names as keys, got a URL\."),
    "number": ({7: "sqlite://"}, r"binds must have names as keys, got 7\."),
    "default": ({"default": "sqlite://"}, r"binds\['default'\] is reserved for tables without a bind key"),
    "no URL": ({"audit": {"echo": True}}, r"binds\['audit'\]\['url'\] is missing"),
    "bad URL": ({"audit": "nothing"}, r"binds\['audit'\] must be a database URL"),
    "bad URL in a dict": ({"audit": {"url": "nothing"}}, r"binds\['audit'\]\['url'\] must be a database URL"),
    "option": ({"audit": {"url": "sqlite://", "pol_size": 3}}, r"binds\['audit'\]\['pol_size'\] is not an option"),
    "wrong type": ({"audit": {"url": "sqlite://", "echo": 7}}, r"binds\['audit'\]\['echo'\] must be true, false"),
    "type": ({"audit": 7}, r"binds\['audit'\] must be a URL string, a URL or an Engine, got int\."),
    "given engine with options": (
        {"audit": {"url": create_engine("sqlite://"), "echo": True}}, r"binds\['audit'\] cannot be applied to an exist",
    ),
    "driver": ({"audit": "postgresql+nonsense://x:secret@h/d"}, r"binds\['audit'\] names the driver 'nonsense'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    binds, problem = MISTAKES[name]
    with pytest.raises(ConfigurationError, match=problem) as caught:
        SQLASessionMiddleware(application, "sqlite://", binds=binds)
    assert "secret" not in str(caught.value)


INI = {
    "sqlalchemy.url": "sqlite://",
    "sqlalchemy.binds.audit.url": "sqlite:///audit.db",
    "sqlalchemy.binds.audit.echo": "debug",
    "sqlalchemy.binds.stats.url": "sqlite://",
    "sqlalchemy.binds.stats.connect_args.cached_statements": "7",
    "sqlalchemy.connect_args.check_same_thread": "false",
    "sqlalchemy.connect_args.isolation_level": "IMMEDIATE",
    "sqlalchemy.binds.audit.connect_args.isolation_level": "none",
    "metadata": "tests.test_binds:main, tests.test_binds:audit",
}


def test_ini(tmp_path):
    app = SQLASessionMiddleware.from_config(application, {**INI, "here": str(tmp_path)})
    assert app.engines["audit"].url.database == f"{tmp_path}/audit.db"
    assert app.engines["audit"].echo == "debug"
    app.init_database()
    assert inspect(app.engines["stats"]).has_table("visit")
    app.dispose()


INI_MISTAKES = {
    "sqlalchemy.binds.audit.pol_size": ("3", "'sqlalchemy.binds.audit.pol_size' in shop.ini is not an option"),
    "sqlalchemy.binds.audit.pool_size": ("x", "'sqlalchemy.binds.audit.pool_size' in shop.ini must be a whole number"),
    "sqlalchemy.binds.audit.url": ("nothing", "'sqlalchemy.binds.audit.url' in shop.ini must be a database URL"),
    "sqlalchemy.binds.more.echo": ("true", "'sqlalchemy.binds.more.url' in shop.ini is missing"),
    "sqlalchemy.binds.default.url": ("sqlite://", "'sqlalchemy.binds.default' in shop.ini is reserved for tables"),
    "sqlalchemy.binds.audit.poolclass": (
        "sqlite://u:secret@h", "'sqlalchemy.binds.audit.poolclass' in shop.ini must be the dotted name of an",
    ),
    "sqlalchemy.binds.audit": ("sqlite://", "'sqlalchemy.binds.audit' in shop.ini must be sqlalchemy.binds.NAME.url"),
    "metadata": ("tests.test_binds:nothing", "'metadata' in shop.ini must be dotted names"),
}  # fmt: skip


@pytest.mark.parametrize("key", INI_MISTAKES)
def test_mistake_in_an_ini(key, tmp_path):
    value, problem = INI_MISTAKES[key]
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware.from_config(
            application, {**INI, "here": str(tmp_path), "__file__": "shop.ini", key: value}
        )
    assert str(caught.value).startswith(problem)
    assert "secret" not in str(caught.value)
