"""The page in a real browser: sessions begun, talked to, stopped, forked and deleted. `make test-browser`."""

import os
import shutil
import time
from pathlib import Path

import pytest
from served import serving, small_model

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def served(tmp_path, monkeypatch):
    with serving(small_model(), tmp_path) as served:
        monkeypatch.setattr(served.server, "ends", frozenset())
        yield served


@pytest.fixture
def page(served):
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 800, "height": 640})
        page.set_default_timeout(20_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(f"http://127.0.0.1:{served.port}/")
        yield page
        browser.close()
    assert errors == []


def until(page, expression: str) -> None:
    """By asking again: the page's policy lets no strings become code, which `wait_for_function` is made of."""
    end = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < end, (expression, page.inner_text("body"))
        page.wait_for_timeout(20)


def test_a_conversation(served, page):
    answers = ["tea", "coffee"]
    page.on("dialog", lambda dialog: dialog.accept(answers.pop(0) if dialog.type == "prompt" else None))
    page.click("#new")
    until(page, "document.getElementById('session').value === 'tea'")
    page.fill("#tokens", "30")
    page.fill("#temperature", "0")
    page.uncheck("#chat")
    page.fill("#prompt", "Hello <b>you</b>")
    page.press("#prompt", "Enter")
    until(page, "document.getElementById('note').textContent.startsWith('46 tokens')")
    text = served.complete("Hello <b>you</b>", 30).text
    assert page.evaluate("document.querySelector('#text .theirs').textContent") == text  # nothing became HTML
    assert page.inner_text("#text .mine") == "Hello <b>you</b>" and page.input_value("#prompt") == ""
    page.check("#chat")
    page.fill("#tokens", "5")
    page.fill("#prompt", "And you?")
    page.click("#send")
    until(page, "document.querySelectorAll('#text .theirs').length === 2 && !document.getElementById('send').disabled")
    seen = served.call("GET", "/v1/sessions/tea")[2]["tokens"]
    assert seen == 46 + len("\n\nuser:\nAnd you?\n\nassistant:\n") + 5
    page.fill("#tokens", "4096")
    page.fill("#prompt", "Go on")
    page.click("#send")
    until(page, "document.querySelectorAll('#text .theirs')[2]?.textContent.length > 20")
    page.click("#stop")
    until(page, "document.getElementById('note').textContent.startsWith('Stopped')")
    served.wait_for(lambda health: health["rows"] == 0)
    assert served.call("GET", "/v1/sessions/tea")[2]["tokens"] == seen
    page.click("#fork")
    until(page, "document.getElementById('session').value === 'coffee'")
    assert served.call("GET", "/v1/sessions/coffee")[2]["tokens"] == seen
    page.click("#delete")
    until(page, "document.getElementById('session').length === 1")
    assert [row["id"] for row in served.call("GET", "/v1/sessions")[2]["data"]] == ["tea"]
    if folder := os.environ.get("HF_RNN_SCREENSHOT"):
        page.screenshot(path=Path(folder) / "serving.png")
