"""The page of experiments of ``make demo`` in a browser: each button, wide and narrow, light and dark, by keyboard."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import PATIENCE, SCHEMES, WIDTHS, browsing, faults, show_as, wait_for_next_page
from .servers import ROOT, end_group

#: The buttons that are pressed one after the other, and a fact that the page shows then, with the library and by hand.
PRESSES = [
    ("failure", ("Orders stored", "0", "1")),
    ("last-ticket", ("Tickets sold", "1", "1")),
    ("outage", ("The database is away", "503", "500")),
    ("outage", ("The database is back", "200", "200")),
    ("streams", ("Streams that got an event", "20", "2")),
    ("slow-readers", ("The other visitor got", "200", "500")),
    ("leak", ("Warnings in the log", "2", "0")),
    ("n-plus-one", ("Statements, cured", "2", "2")),
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browsing() as driver:
        yield driver


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, driver: Any) -> Iterator[str]:
    """What ``make demo`` starts, from a copy. Its address."""
    folder = tmp_path_factory.mktemp("demo")
    examples = shutil.copytree(
        ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.db*", "__pycache__")
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "guestbook", "--port", "0"],
            cwd=Path(examples),
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(examples)])},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        announced = process.stdout.readline()
        found = re.search(r"http://\S+/", announced)
        assert found, announced + (folder / "log").read_text(errors="replace")
        yield found[0]
    finally:
        end_group(process)
        assert process.stdout is not None
        process.stdout.close()


def facts(driver: Any, name: str) -> list[tuple[str, ...]]:
    """The facts of an experiment, each with its value with the library and by hand."""
    library, hand = (
        {each.find_element("css selector", "dt").text: each.find_element("css selector", "dd").text for each in rows}
        for rows in (
            article.find_elements("css selector", "dl div")
            for article in driver.find_elements("css selector", f"#{name} article")
        )
    )
    return [(fact, value, hand[fact]) for fact, value in library.items()]


def button_of(driver: Any, name: str) -> Any:
    return driver.find_element("css selector", f"#{name} button")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_each_button_shows_what_it_claims(driver: Any, demo: str, width: int, scheme: str) -> None:
    show_as(driver, width, scheme)
    driver.get(f"{demo}experiments/")
    assert faults(driver) == []
    for name, expected in PRESSES:
        button = button_of(driver, name)
        button.click()
        wait_for_next_page(driver, button)
        assert expected in facts(driver, name)
        assert driver.current_url.endswith(f"/experiments/#{name}")
        assert faults(driver) == []
    for summary in driver.find_elements("css selector", "summary"):
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", summary)
        summary.click()
    assert faults(driver) == []
    beside = "return arguments[0].getBoundingClientRect().top === arguments[1].getBoundingClientRect().top"
    shops = driver.find_elements("css selector", "#failure article")
    assert driver.execute_script(beside, *shops) == (width == max(WIDTHS))


def test_each_button_can_be_pressed_by_keyboard(driver: Any, demo: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    show_as(driver, 1280, "light")
    for name, expected in PRESSES:
        driver.get(f"{demo}experiments/")
        button = button_of(driver, name)
        for _ in range(150):
            ActionChains(driver).send_keys(Keys.TAB).perform()
            if driver.switch_to.active_element == button:
                break
        assert driver.switch_to.active_element == button
        assert driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", button) == "solid"
        ActionChains(driver).send_keys(Keys.ENTER).perform()
        wait_for_next_page(driver, button)
        assert expected in facts(driver, name)
        assert faults(driver) == []


def test_the_pages_lead_to_each_other_when_their_links_are_followed(driver: Any, demo: str) -> None:
    show_as(driver, 390, "dark")
    driver.get(demo)
    driver.find_element("link text", "Experiments").click()
    assert driver.title == "Experiments"
    driver.find_element("partial link text", "Guestbooks").click()
    assert driver.title == "Guestbooks"
    assert faults(driver) == []


def test_the_stream_arrives_when_it_is_opened_in_the_browser(driver: Any, demo: str) -> None:
    driver.set_script_timeout(PATIENCE)
    driver.get(demo)
    received = driver.execute_async_script(
        """
        const done = arguments[0];
        const source = new EventSource("experiments/library/events");
        source.onmessage = (event) => { source.close(); done(event.data); };
        source.onerror = () => { source.close(); done("error"); };
        """
    )
    assert received == "1"
