"""Debian's chromium, driven by Selenium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromedriver")
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
#: Seconds for a page.
PATIENCE = 60

#: The elements with text of their own whose contrast with their background is below 4.5 (WCAG 2.1, 1.4.3).
PALE = """
const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const luminance = ([red, green, blue]) =>
  0.2126 * linear(red / 255) + 0.7152 * linear(green / 255) + 0.0722 * linear(blue / 255);
const parts = (color) => color.match(/[\\d.]+/g).map(Number);
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = parts(getComputedStyle(each).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
  return parts(getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "0 0 0" : "255 255 255");
};
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!hasText || !element.checkVisibility()) continue;
  const both = [parts(getComputedStyle(element).color), behind(element)].map(luminance);
  const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  if (contrast < 4.5) found.push(`${element.tagName} ${element.className}: ${contrast.toFixed(2)}`);
}
return [...new Set(found)];
"""


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser without a window. Skips the test if there is none; with CI set, it fails instead."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [] if find_spec("selenium") else ["selenium"]
    if missing:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {' and no '.join(missing)}, and CI is set")
        pytest.skip(f"there is no {' and no '.join(missing)}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(PATIENCE)
    try:
        yield driver
    finally:
        driver.quit()


def show_as(driver: Any, width: int, scheme: str) -> None:
    """Give the page a width, which may be that of a telephone, and a color scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def faults(driver: Any) -> list[str]:
    """What is wrong with the page that is shown: errors of its console, what is wider than the window, pale text."""
    found = [each["message"] for each in driver.get_log("browser")]
    width, shown = driver.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    if width > shown:
        found.append(f"the page is {width} pixels wide in a window of {shown}")
    return found + [f"pale: {each}" for each in driver.execute_script(PALE)]


def wait_for_next_page(driver: Any, element: Any) -> None:
    """Wait until the page of an element is gone, and the next one is complete."""
    from selenium.webdriver.support.expected_conditions import staleness_of
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(driver, PATIENCE)
    wait.until(staleness_of(element))
    wait.until(lambda each: each.execute_script("return document.readyState") == "complete")
