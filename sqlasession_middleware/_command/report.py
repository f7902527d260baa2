"""Prints what ``sqlasession check`` has found out."""

from __future__ import annotations

from collections.abc import Iterable

import click

from ..capacity import Capacity, aligned
from .messages import complain, counted
from .survey import ApplicationSurvey, Demand, EngineSurvey, Survey

__all__ = ["complain_of_inspectors", "print_survey"]


def print_survey(path: str, survey: Survey) -> None:
    """Print tables and comparisons to the standard output, and then the problems to the standard error.

    :param path: the path of the ini file.
    """
    processes = counted(survey.workers.processes, "process", "processes")
    threads = counted(survey.workers.threads, "thread", "threads")
    click.echo(f"{path}: {processes} of {threads}")
    for number, application in enumerate(survey.applications, 1):
        if len(survey.applications) > 1:
            click.echo(f"\napplication {number} of {len(survey.applications)}: {application.name}")
        click.echo(_table(application))
    for demand in survey.demands:
        click.echo(_comparison(demand))
    for capacity, ping in survey.unanswered():
        complain(f"{capacity.name} ({capacity.server}) does not answer: {ping.problem}")
    complain_of_inspectors(path, survey.inspectors)
    for demand in survey.unmet():
        complain(f"{_comparison(demand)}. Lower pool_size and max_overflow, or raise the limit.")


def complain_of_inspectors(path: str, inspectors: Iterable[str]) -> None:
    """Print to the standard error which inspectors should not be there.

    :param path: the path of the ini file.
    :param inspectors: their paths.
    """
    for inspector in inspectors:
        complain(
            f"the inspector is on, at {inspector}: take it out of {path}, or give --development if nobody else uses it."
        )


def _table(application: ApplicationSurvey) -> str:
    rows = [(*engine.capacity.cells(), _answer(engine)) for engine in application.engines]
    return "\n".join(aligned([(*Capacity.TITLES, "ping"), *rows]))


def _answer(engine: EngineSurvey) -> str:
    milliseconds = engine.ping.milliseconds
    return "no answer" if milliseconds is None else f"{milliseconds:.1f} ms"


def _comparison(demand: Demand) -> str:
    limit = demand.limit
    reserved = f", of which {limit.reserved} are reserved for administrators" if limit.reserved else ""
    return f"{demand.server}: up to {demand.connections} connections; {limit.name} is {limit.maximum}{reserved}"
