"""Imports point one way, also those for type checkers: see the map in CONTRIBUTING.rst."""

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name

from .sources import module_files, parse

#: From the bottom up: a module imports from its own room, and from rooms before it; the package itself is the last.
ROOMS = "errors _dependencies _wsgi _drivers failures _settings _scope _database _recording _sessions _lifecycle"
ROOMS += " _transaction transaction unavailable leaks capacity middleware _tenants tenants metrics _typing pages"
ROOMS += " models request testing pytest_plugin health _inspector inspector paste _flask flask_sqlalchemy _pyramid"
ROOMS += " pyramid _command"
PLACES = {room: place for place, room in enumerate((*ROOMS.split(), "cli", ""))}


def test_modules_import_from_their_own_room_and_from_rooms_before_it() -> None:
    modules, imports = module_files(), {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in (each for each in ast.walk(parse(path)) if isinstance(each, ast.Import | ast.ImportFrom)):
            names = {each.name for each in node.names}
            if isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                names = {f"{base}.{each}" for each in names} & modules.keys() or {base}
            for imported in {each for each in names if f"{each}.".startswith("sqlasession_middleware.")}:
                imports.setdefault(name, set()).add(imported)
                lower, upper = (PLACES.get(f"{each}..".split(".")[1]) for each in (imported, name))
                allowed = None not in (lower, upper) and lower <= upper
                assert allowed, f"{path}:{node.lineno}: {ast.unparse(node)}: rooms are {list(PLACES)}"
    assert len(imports) > 40
    TopologicalSorter(imports).prepare()  # Its CycleError shows the modules of a circle.
