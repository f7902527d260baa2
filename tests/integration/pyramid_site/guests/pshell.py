from __future__ import annotations

from typing import Any

from . import models


def setup(env: dict[str, Any]) -> None:
    request = env["request"]
    request.tm.begin()
    env["tm"] = request.tm
    env["dbsession"] = request.dbsession
    env["models"] = models
