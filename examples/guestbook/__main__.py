"""``python -m guestbook``: serve the guestbooks of an ini file with waitress."""

from __future__ import annotations

import argparse
import sys
from logging.config import fileConfig
from pathlib import Path
from typing import Any
from urllib.parse import quote

from paste.deploy import loadapp
from paste.deploy.loadwsgi import SERVER, loadcontext
from waitress import create_server

from sqlasession_middleware.inspector import InspectorMiddleware

DEVELOPMENT_INI = Path(__file__).with_name("development.ini")


def port_number(text: str) -> int:
    """Check the range: waitress would listen on another port for 99999."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {port}")
    return port


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m guestbook", description="Serve the guestbooks of an ini file.")
    parser.add_argument("ini", nargs="?", type=Path, default=DEVELOPMENT_INI, help="(default: development.ini)")
    parser.add_argument("--port", type=port_number, help="instead of the ini's; 0 picks a free one")
    arguments = parser.parse_args()
    ini = arguments.ini.resolve()
    if not ini.is_file():
        sys.exit(f"There is no file {ini}.")

    fileConfig(ini, disable_existing_loggers=False, encoding="utf-8")
    config = f"config:{quote(ini.as_posix(), safe='/:')}"
    app = loadapp(config)
    server_settings = loadcontext(SERVER, config).local_conf
    if arguments.port is not None:
        server_settings["port"] = arguments.port
    host, port = server_settings["host"], server_settings["port"]
    try:
        # The ini's waitress#main would do the same, but not report its port.
        server = create_server(app, **server_settings)
    except (OSError, ValueError) as error:
        said = f"'port' of [server:main] in {ini.name}" if arguments.port is None else "--port"
        sys.exit(
            f"Cannot serve on {host}:{port} ({said}): {error}."
            " Choose another port: make demo PORT=8080, or python -m guestbook --port 8080."
        )
    port = getattr(server, "effective_port", port)  # The attribute is missing for a host with several addresses.
    address = f"http://{host}:{port}"
    print(f"Guestbook on {address}/ (stop with Ctrl-C)", flush=True)
    inspector = find_inspector(app)
    if inspector is not None:
        print(f"What requests do to databases: {inspector.url(address)}", flush=True)
    server.run()


def find_inspector(app: Any) -> InspectorMiddleware | None:
    """The inspector, if the ini file has one."""
    while app is not None and not isinstance(app, InspectorMiddleware):
        app = getattr(app, "app", None)
    return app


if __name__ == "__main__":
    main()
