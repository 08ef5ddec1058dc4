"""The page's dialog of models: what is here, what fits, getting one with progress, cancelling, deleting."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page, expect

from server.conftest import Served
from server.test_ollama_client import hub
from server.test_page import browser
from support.hub_server import Fault, Hub

__all__ = ["browser", "hub"]

pytestmark = pytest.mark.slow


@pytest.fixture
def dialog(hub: Hub, serve: Callable[..., Served], browser: Browser) -> Page:
    """The dialog, of a server with a store of its own and a hub at hand."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(serve().url)
    expect(page.locator("#model option").first).to_be_attached()
    page.get_by_role("button", name="Models", exact=True).click()
    expect(page.locator("#model-list li")).to_have_count(1)
    return page


def test_what_is_here_and_what_fits(dialog: Page):
    expect(dialog.locator("#memory")).to_contain_text("GB of memory, of which models can have")
    demo = dialog.locator("#model-list li").first
    expect(demo).to_contain_text("needs about")
    expect(demo).to_contain_text("fits")
    expect(demo.locator(".badge").first).to_have_text("Toy")
    expect(demo.get_by_role("button", name="Delete")).to_have_count(0)
    expect(dialog.locator("#pull-hint")).to_contain_text("minicpm-v-4.5 needs about 6.2 GB of memory")


def test_a_model_is_got_used_and_deleted(dialog: Page, hub: Hub):
    hub.released.clear()
    hub.faults.append(Fault(stall_after=200_000))
    dialog.get_by_label("Get a model").fill("hf:org/demo")
    dialog.keyboard.press("Enter")
    expect(dialog.locator("#pull-status")).to_contain_text(re.compile(r"\d % · \d+ MB of \d+ MB"), timeout=30_000)
    assert 0 < float(dialog.locator("#pull-bar").get_attribute("value") or 0) <= 1
    hub.released.set()
    expect(dialog.locator("#model-list li")).to_have_count(2, timeout=60_000)
    expect(dialog.locator("#pulling")).to_be_hidden()
    dialog.get_by_role("button", name="Use hf:org/demo").click()
    expect(dialog.locator("#models")).to_be_hidden()
    assert dialog.locator("#model").input_value().startswith("hf:org/demo")
    dialog.get_by_role("button", name="Models", exact=True).click()
    expect(dialog.locator("#model-list li").nth(1)).to_contain_text("Answers in this page")
    dialog.get_by_role("button", name="Delete hf:org/demo").click()
    dialog.get_by_role("button", name="Delete", exact=True).click()
    expect(dialog.locator("#model-list li")).to_have_count(1)
    assert dialog.locator("#model").input_value() == "demo:latest"


def test_getting_one_is_cancelled(dialog: Page, hub: Hub):
    hub.released.clear()
    hub.stalled.clear()
    hub.faults.append(Fault(stall_after=2_000_000))
    dialog.get_by_label("Get a model").fill("hf:org/demo")
    dialog.keyboard.press("Enter")
    assert hub.stalled.wait(60)
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog.locator("#pull-trouble")).to_contain_text("Cancelled")
    expect(dialog.locator("#pulling")).to_be_hidden()
    hub.released.set()
    expect(dialog.locator("#model-list li")).to_have_count(1)


def test_what_cannot_be_got_is_told(dialog: Page):
    dialog.get_by_label("Get a model").fill("llama3")
    dialog.get_by_role("button", name="Get", exact=True).click()
    expect(dialog.locator("#pull-trouble")).to_contain_text("cannot be pulled")
    expect(dialog.locator("#pulling")).to_be_hidden()
