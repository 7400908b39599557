"""The page of `lutserve report` in a real browser: sorting, filtering, keyboard, colours, no errors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_cases import VALUES, fill

from lutserve.report.render import collect, write

api = pytest.importorskip("playwright.sync_api", reason="needs lutserve[dev]: pip install playwright")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    page = folder / "report.html"
    write(collect(fill(folder)), "html", page)
    return page.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = str(own) if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if found is None:
            pytest.skip("no Chromium; `apt-get install chromium`, or `playwright install chromium`")
        running = playwright.chromium.launch(executable_path=found)
        yield running
        running.close()


@pytest.fixture
def page(browser: api.Browser, url: str) -> Iterator[api.Page]:
    """The open page; whatever it complains of, or asks of a network, fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: complaints.append(request.url) if request.url != url else None)
    opened.goto(url)
    yield opened
    context.close()
    assert complaints == []


def column(page: api.Page, number: int, table: str = "#matrix-1") -> list[str]:
    """The values of a column, as shown, without what is below them."""
    cells = page.locator(f"{table} tbody tr:not([hidden])").all()
    return [cell.locator("th, td").nth(number).inner_text().split("\n")[0] for cell in cells]


def test_title_is_not_from_the_data(page: api.Page) -> None:
    assert "lutserve report" in page.title()


def test_sorting_by_number(page: api.Page) -> None:
    heading = page.locator("#matrix-1 thead th").nth(4)
    perplexities = [ppl for *_, ppl in VALUES.values()]
    known = sorted(value for value in perplexities if not math.isnan(value))
    written = ["inf" if value == math.inf else f"{value:.3f}" for value in known]
    before = column(page, 4)
    assert heading.get_attribute("aria-sort") == "none"
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(page, 4) == [*written, "nan"]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, 4) == [*written[::-1], "nan"]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "none"
    assert column(page, 4) == before


def test_sorting_by_text_with_the_keyboard(page: api.Page) -> None:
    button = page.locator("#matrix-1 thead th").nth(1).get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    assert column(page, 1) == sorted(recipe for _, recipe in VALUES)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator("#matrix-1 [aria-sort=ascending]").count() == 1
    assert page.locator("#matrix-1 thead th").nth(2).get_attribute("aria-sort") == "ascending"


def test_filtering(page: api.Page) -> None:
    box = page.get_by_role("searchbox").first
    table = f"#{box.get_attribute('aria-controls')}"
    rows = page.locator(f"{table} tbody tr").count()
    assert rows > 8
    texts, word = column(page, 0, table), "prefill"
    box.fill(f"  {word.upper()} ")
    shown = page.locator(f"{table} tbody tr:visible").count()
    assert shown == sum(word in text for text in texts)
    assert 0 < shown < rows
    status = page.locator(f".filter:has([aria-controls={table[1:]}]) output")
    assert status.inner_text() == f"{shown} of {rows} rows"
    box.fill("no row has this")
    assert page.locator(f"{table} tbody tr:visible").count() == 0
    box.fill("")
    assert page.locator(f"{table} tbody tr:visible").count() == rows
    assert status.inner_text() == ""


def test_numbers_lead_to_their_records(page: api.Page) -> None:
    link = page.locator("#matrix-1 tbody a").first
    link.focus()
    page.keyboard.press("Enter")
    record = page.locator(str(link.get_attribute("href")))
    assert "cells.jsonl:1" in record.inner_text()
    assert page.evaluate("document.activeElement.id") == str(link.get_attribute("href"))[1:]
    record.locator("a").click()
    machine = page.locator("details.machine[open]")
    assert "A <CPU>" in machine.inner_text()


def test_keyboard_reaches_everything_and_shows_where_it_is(page: api.Page) -> None:
    page.keyboard.press("Tab")
    skip = page.locator(".skip")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert (skip.bounding_box() or {"x": -1})["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        what, outline, width = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.tagName, s.outlineStyle, s.outlineWidth] })()"
        )
        seen.add(what)
        assert (outline, width) == ("solid", "3px"), what
    assert {"DIV", "BUTTON", "A"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colour_schemes(browser: api.Browser, url: str, scheme: str) -> None:
    other = {"light": "dark", "dark": "light"}[scheme]
    background = "getComputedStyle(document.body).backgroundColor"
    with browser.new_context(color_scheme=scheme) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(url)
        first = page.evaluate(background)
        assert (first == "rgb(255, 255, 255)") == (scheme == "light")
        page.get_by_label("Theme").select_option(other)
        assert (page.evaluate(background) == "rgb(255, 255, 255)") == (other == "light")
        page.get_by_label("Theme").select_option("light dark")
        assert page.evaluate(background) == first


def test_a_narrow_screen_scrolls_tables_not_the_page(browser: api.Browser, url: str) -> None:
    with browser.new_context(viewport={"width": 390, "height": 800}) as context:
        page = context.new_page()
        page.goto(url)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_scripts_everything_is_there(browser: api.Browser, url: str) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(url)
        assert page.locator("#matrix-1 tbody tr:visible").count() == len(VALUES)
        assert page.locator(".filter:visible, .theme:visible").count() == 0
        assert page.locator("figure svg[role=img]:visible").count() > 8
