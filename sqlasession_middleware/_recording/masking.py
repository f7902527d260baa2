"""Parameters and texts of statements as they may be shown: secrets are replaced by stars.

A parameter is a secret if the name of its bind, or of the column that it is for, says so: ``password``, ``api_key``,
``reset_token``. Where the names are not known, such as in ``exec_driver_sql("… WHERE token = ?", …)``, and the
statement names a secret, all of its parameters are. A text that names a secret in itself, as JSON does, is one. The
engine's ``hide_parameters`` hides all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, ColumnClause, TextClause

if TYPE_CHECKING:
    from sqlalchemy.sql.compiler import SQLCompiler

    from .record import Statement

__all__ = [
    "MASK",
    "Masked",
    "hidden_in_sql",
    "is_secret",
    "mask_parameters",
    "mask_source",
    "mask_sql",
    "shown_error",
    "without_values",
]

#: What stands in the place of a secret.
MASK: Final = "***"
#: How many characters of a value are shown.
SHOWN: Final = 1024
#: How many of the sets of parameters of an ``executemany()`` are shown.
SETS: Final = 3
#: How many of the sets are looked at.
_LOOKED_AT: Final = 1000
#: How many parameters of a set are shown.
NAMES: Final = 100
#: How many characters of a statement are shown.
SQL_SHOWN: Final = 20_000
#: A longer statement is taken for one that names a secret.
_SEARCHED: Final = 100_000

#: What makes a name one of a secret: a part of it, or one of the words that it is made of.
_PARTS: Final = re.compile(
    "password|passwd|passphrase|passcode|pwd|secret|token|apikey|credential|cookie|session_?(id|key)"
)
_WORDS: Final = frozenset(
    (
        "auth",
        "csrf",
        "cvc",
        "cvv",
        "hash",
        "iban",
        "key",
        "keys",
        "nonce",
        "otp",
        "pass",
        "pin",
        "salt",
        "signature",
        "ssn",
    )
)
_WORD: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_IDENTIFIER: Final = re.compile(r"[^\W\d]\w*")
#: Where SQL says "key" and means none.
_SQL_KEYS: Final = re.compile(r"\b(PRIMARY|FOREIGN|DUPLICATE|UNIQUE|NO)\s+KEY\b", re.IGNORECASE)
#: The names in JSON, in the query of a URL, or in "password: …".
_NAMES_IN_VALUE: Final = re.compile(r"""(?<![\w-])([\w-]+)["']?\s*[:=]""")
#: Texts in SQL: quoted, and those of PostgreSQL between dollars.
_TEXTS: Final = re.compile(r"'(?:[^'\\]|''|\\.)*'|\$(\w*)\$.*?\$\1\$", re.DOTALL)
#: The same with MySQL's, which other servers take for names.
_ALL_TEXTS: Final = re.compile(_TEXTS.pattern + r'|"(?:[^"\\]|""|\\.)*"', re.DOTALL)
#: What makes it unclear where texts end: servers differ in what a backslash means, and comments have quotes.
_UNCLEAR: Final = re.compile(r"\\|--|/\*|#")
#: Names between quotes, which are to stay.
_NAMES: Final = re.compile(r'"[^"]*"|`[^`]*`')
_TEXTS_AND_NAMES: Final = re.compile(f"{_NAMES.pattern}|{_TEXTS.pattern}", re.DOTALL)
#: Numbers that may be secrets.
_NUMBERS: Final = re.compile(r"(?<![\w$:.%?])(?:0[xX]\w+|\d{3,}\w*(?:\.\d+)?)")
#: What PostgreSQL and MariaDB tell of the database's own values.
_ROW: Final = re.compile(r"Failing row contains .*", re.DOTALL)
_ENTRY: Final = re.compile(r"(Duplicate entry) '.*'( for key)", re.DOTALL)
_DETAIL: Final = re.compile(r"Key \((.*?)\)=\(.*\)")
#: Whatever is quoted, the quotes in it as well.
_ANY_QUOTED: Final = re.compile(r"""['"].*['"]""", re.DOTALL)
#: Texts in a line of Python, of which the end may be on a later one.
_PYTHON_TEXTS: Final = re.compile(r"""'(?:[^'\\]|\\.)*(?:'|$)|"(?:[^"\\]|\\.)*(?:"|$)""")
#: What SQLAlchemy adds to the name of a bind: ``password_1``, ``password_1_2``, ``password_m0``, ``password__0``.
_SUFFIX: Final = re.compile(r"(_+m?\d+)+$")

_PLAIN: Final = (bool, int, float, Decimal, datetime, date, time, timedelta, UUID)
_shorter: Final = Repr()
_shorter.maxstring = _shorter.maxother = SHOWN
_shorter.maxdict = _shorter.maxlist = _shorter.maxtuple = _shorter.maxset = 20

#: By the compiled statement: its binds that are secrets, and whether it names any secret.
_found: WeakKeyDictionary[Any, tuple[frozenset[str], bool]] = WeakKeyDictionary()


class Masked(NamedTuple):
    """The parameters of a statement.

    :param sets: the first :data:`SETS` of them, each a list of names and values as they are shown.
    :param total: how many sets there are; 0 if the statement has no parameters.
    :param secrets: the values that are not shown, as texts. They are for :func:`without_values` only.
    :param is_whole: whether these are all; those of very many sets are not looked at.
    """

    sets: list[list[tuple[str, str]]]
    total: int
    secrets: frozenset[str]
    is_whole: bool = True

    @property
    def has_secrets(self) -> bool:
        """Whether something is not shown."""
        return bool(self.secrets)


def is_secret(name: str) -> bool:
    """Whether a name is that of a secret."""
    return _PARTS.search(name.lower()) is not None or any(word.lower() in _WORDS for word in _WORD.findall(name))


def mask_parameters(statement: Statement, is_hidden: bool = False) -> Masked:
    """The parameters of a statement as they may be shown.

    :param is_hidden: whether none is: ``hide_parameters`` of the engine.
    """
    given = statement.parameters
    sets = list(given) if statement.is_many and not isinstance(given, Mapping) else [given]
    if not all(isinstance(each, Mapping | list | tuple) for each in sets):
        sets = [given if isinstance(given, list | tuple) else ()]  # One INSERT of many rows.
    names, has_secrets = _binds_of(statement)
    secrets: set[str] = set()
    shown = []
    for number, each in enumerate(sets[:_LOOKED_AT]):
        row = []
        for name, value, is_known in _named(statement, each):
            text = _shown_value(value)
            if (
                is_hidden
                or name in names
                or is_secret(name)
                or (has_secrets and not is_known)
                or any(map(is_secret, _NAMES_IN_VALUE.findall(text)))
            ):
                secrets.add(str.__str__(value) if isinstance(value, str) else text)
                text = MASK
            row.append((name, text))
        if number < SETS and row:
            shown.append(row[:NAMES])
    return Masked(shown, len(sets) if any(sets) else 0, frozenset(secrets), len(sets) <= _LOOKED_AT)


def mask_sql(statement: Statement) -> str:
    """The beginning of the text of a statement, without the texts and long numbers in it if it names a secret."""
    sql = statement.sql[:SQL_SHOWN]
    if not _may_hide(statement):
        return sql
    is_own = _is_own(statement)
    quotes = "'\"" if is_own else "'"
    masked = _ALL_TEXTS.sub("\0", sql) if is_own else _TEXTS_AND_NAMES.sub(_without_text, sql)
    if any(quote in _NAMES.sub("", masked) for quote in quotes) or _UNCLEAR.search(sql):
        first = min((found for quote in quotes if (found := sql.find(quote)) >= 0), default=len(sql))
        masked = f"{sql[:first]}\0" if first < len(sql) else masked
    if is_own:
        masked = _NUMBERS.sub(MASK, masked)
    return masked.replace("\0", f"'{MASK}'")


def hidden_in_sql(statement: Statement) -> frozenset[str]:
    """What :func:`mask_sql` does not show, for :func:`without_values` only."""
    sql = statement.sql[:SQL_SHOWN]
    if mask_sql(statement) == sql:
        return frozenset()
    texts = {found[0].strip("'\"") for found in _ALL_TEXTS.finditer(sql)}
    return frozenset({*texts, *_NUMBERS.findall(sql), sql})


def _may_hide(statement: Statement) -> bool:
    sql = statement.sql
    if not _is_own(statement) and "'" not in sql and "$" not in sql:
        return False
    return len(sql) > _SEARCHED or any(map(is_secret, _IDENTIFIER.findall(_SQL_KEYS.sub("", sql))))


def _is_own(statement: Statement) -> bool:
    """Whether the application has written the text itself."""
    compiled: Any = statement.compiled
    return compiled is None or isinstance(compiled.statement, TextClause)


def _without_text(found: re.Match[str]) -> str:
    return found[0] if found[0][0] in '"`' else "\0"


def mask_source(line: str) -> str:
    """A line of Python without the texts in it, if it names a secret."""
    if any(map(is_secret, _IDENTIFIER.findall(line))):
        line = _PYTHON_TEXTS.sub(f"'{MASK}'", line)
    return line


def shown_error(error: BaseException, masked: Masked, hidden: frozenset[str] = frozenset()) -> str:
    """What a driver says, without what the statement's secrets are.

    :param error: SQLAlchemy's, whose own text has the statement with its parameters, or the driver's.
    :param hidden: those in the text of the statement.
    """
    original = getattr(error, "orig", None) or error
    name = type(original).__name__
    try:
        said = str(original)
        arguments = [str(each) for each in original.args] if hidden else []
    except Exception:  # Of a class of the application's.
        return name
    if masked.has_secrets and not masked.is_whole:
        return name
    if hidden:  # It may quote a part of the statement.
        said = ": ".join(arguments) if len(arguments) > 1 else said
        said = _ANY_QUOTED.sub(f"'{MASK}'", said.partition("\n")[0])
    elif masked.has_secrets:
        said = said.partition("\n")[0]  # The rest shows rows of the database.
    # Values that the statement does not have, but the row.
    said = _DETAIL.sub(_without_detail, _ENTRY.sub(rf"\1 '{MASK}'\2", _ROW.sub(f"Failing row contains {MASK}", said)))
    return without_values(f"{name}: {said}", masked.secrets | hidden)[:SHOWN]


def _without_detail(found: re.Match[str]) -> str:
    return f"Key ({found[1]})=({MASK})" if any(map(is_secret, _IDENTIFIER.findall(found[1]))) else found[0]


def without_values(text: str, values: Iterable[str]) -> str:
    """Replace values in a text, longer ones first."""
    for value in sorted((each for each in values if each and each in text), key=len, reverse=True):
        # A short one is a part of other words.
        pattern = re.escape(value) if len(value) > 3 else rf"(?<!\w){re.escape(value)}(?!\w)"
        text = re.sub(pattern, MASK, text)
    return text


def _shown_value(value: Any) -> str:
    try:
        return _text_of(value)
    except Exception:  # Of a class of the application's, or a number that Python does not write.
        return f"({type(value).__name__})"


def _text_of(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}… ({len(value)} characters)"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({len(value)} bytes)"
    if isinstance(value, _PLAIN):
        return str(value)
    return _shorter.repr(value)[:SHOWN]  # It takes care of those that fail.


def _named(statement: Statement, values: Any) -> Iterator[tuple[str, Any, bool]]:
    """The name and value of each parameter of a set, and whether the name is known."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield str(name), value, True
        return
    names = _positions(statement.compiled, len(values))
    for number, value in enumerate(values):
        yield (str(number + 1), value, False) if names is None else (names[number], value, True)


def _positions(compiled: Any, count: int) -> Sequence[str] | None:
    """The names of parameters that have none of their own; None if they are not known.

    The text that was sent has more of them than the compiled one where ``IN`` has several values, or where one INSERT
    has many rows.
    """
    names = getattr(compiled, "positiontup", None)
    if not names:
        return None
    several = [name for name in names if getattr(compiled.binds.get(name), "expanding", False)]
    if len(several) == 1:
        found: list[str] = []
        for name in names:
            found += [name] * (count - len(names) + 1 if name == several[0] else 1)
        return found
    if several or count % len(names):
        return None
    return list(names) * (count // len(names))


def _binds_of(statement: Statement) -> tuple[frozenset[str], bool]:
    """The binds of a statement that are secrets, and whether it names any secret at all."""
    compiled: Any = statement.compiled
    if compiled is None:
        return frozenset(), any(map(is_secret, _IDENTIFIER.findall(_SQL_KEYS.sub("", statement.sql))))
    found = _found.get(compiled)
    if found is None:
        binds = frozenset(_secret_binds(compiled))
        names = any(map(is_secret, _IDENTIFIER.findall(_SQL_KEYS.sub("", compiled.string))))
        found = _found[compiled] = binds, names or bool(binds)
    return found


def _secret_binds(compiled: SQLCompiler) -> Iterator[str]:
    """Those that are compared with a column of a secret, or set it, whatever the names of the binds are."""
    statement: Any = compiled.statement
    # One name for each bind; its key is another one where the name was made.
    names = {id(bind): name for bind, name in getattr(compiled, "bind_names", {}).items()}
    table = getattr(statement, "table", None) if getattr(statement, "is_dml", False) else None
    if table is not None:
        columns = {column.key: column for column in table.c}
        is_named = _names_secret(columns, compiled)
        for name in compiled.binds:
            column = columns.get(name, columns.get(_SUFFIX.sub("", name)))
            if _is_column_of_secret(column) if column is not None else is_named:
                yield name
    for element in visitors.iterate(statement):
        if isinstance(element, BinaryExpression):
            parts = list(visitors.iterate(element))
            if any(_is_column_of_secret(each) for each in parts if isinstance(each, ColumnClause)):
                yield from (names.get(id(each), each.key) for each in parts if isinstance(each, BindParameter))


def _is_column_of_secret(column: Any) -> bool:
    return is_secret(str(column.name)) or is_secret(str(column.key))


def _names_secret(columns: Mapping[str, Any], compiled: SQLCompiler) -> bool:
    """Whether the text of a statement names one of its table's columns of secrets: a function may make its value."""
    words = set(_IDENTIFIER.findall(compiled.string))
    return any(str(column.name) in words for column in columns.values() if _is_column_of_secret(column))
