from __future__ import annotations

import sys

from pyramid.paster import bootstrap, setup_logging

from ..models import Guest


def main(ini: str) -> None:
    setup_logging(ini)
    with bootstrap(ini) as env, env["request"].tm:
        env["request"].dbsession.add(Guest(name="initial"))


if __name__ == "__main__":
    main(*sys.argv[1:])
