"""How the demo's page looks, and whether everybody can use it. Makes the pictures of the documentation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from .conftest import IMAGES, Demo, Window

FORMS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 760}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 760}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True},
}


@pytest.fixture(params=FORMS)
def window(request: pytest.FixtureRequest, browser: Browser, demo: Demo) -> Iterator[Window]:
    context = browser.new_context(device_scale_factor=2, reduced_motion="reduce", **FORMS[request.param])
    window = Window(context.new_page(), demo, 1)
    yield window
    context.close()


def faults(window: Window) -> list[str]:
    """The serious faults that axe finds on the page as it is."""
    found = Axe().run(window.page).response["violations"]
    return [
        f"{each['id']}: {each['help']} ({', '.join(str(node['target']) for node in each['nodes'])})"
        for each in found
        if each["impact"] in {"serious", "critical"}
    ]


def converse(demo: Demo) -> None:
    for author, body in (
        ("Grace", "Two windows, one room. What is committed in one is in the other before you look up."),
        ("Ada", "And if the server goes away?"),
        ("Grace", "Then the badge says so, and we go on from the same offset when it is back. Nothing is lost."),
        ("Radia", "This one was edited a moment ago; everybody saw it change."),
    ):
        message = demo.call("POST", "rooms/1/messages", {"author": author, "body": body})
    demo.call("PATCH", f"messages/{message['id']}", {"body": body + " ✓"})


def test_nobody_is_shut_out(window: Window, demo: Demo) -> None:
    """axe-core finds no serious fault: at rest, with the menu open, in the editor, and when the server is away."""
    converse(demo)
    window.message("And if the server goes away?").wait_for()
    assert faults(window) == []
    window.message("And if the server goes away?").locator("button.icon").click()
    window.page.get_by_role("menuitem", name="Edit").wait_for()
    assert faults(window) == []
    window.page.get_by_role("menuitem", name="Edit").click()
    assert faults(window) == []
    window.page.keyboard.press("Escape")
    if window.page.locator("#flip").is_visible():
        window.page.locator("#flip").click()
        assert faults(window) == []
        window.page.locator("#back").click()
    demo.call("PUT", "server", {"running": False})
    window.wait_for_state("offline")
    assert faults(window) == []


def test_nothing_overflows_the_page(window: Window, demo: Demo) -> None:
    converse(demo)
    demo.call("POST", "rooms", {"name": "A room with a rather long name for it"})
    demo.call("POST", "rooms/1/messages", {"author": "A" * 40, "body": "longword" * 60})
    window.page.reload()
    window.wait_for_state("live")
    assert window.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = window.page.evaluate("""() => [...document.querySelectorAll("main *, aside *")]
        .filter((each) => !each.closest("nav, .sr") && each.checkVisibility())
        .filter((each) => getComputedStyle(each).position !== "absolute")
        .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
        .map((each) => each.outerHTML.slice(0, 80))""")
    assert wide == []


@pytest.mark.parametrize("form", FORMS)
def test_pictures_of_the_page(form: str, browser: Browser, demo: Demo, tmp_path: Path) -> None:
    context = browser.new_context(device_scale_factor=2, reduced_motion="reduce", **FORMS[form])
    try:
        window = Window(context.new_page(), demo, 1)
        window.page.fill("#author", "Ada")
        converse(demo)
        window.page.locator("li.message em:visible").wait_for()
        window.page.evaluate("document.activeElement.blur()")
        kept = IMAGES if os.environ.get("KEEP_IMAGES") else tmp_path
        kept.mkdir(exist_ok=True)
        picture = window.page.screenshot(path=kept / f"demo-{form}.png")
        assert len(picture) > 20_000
    finally:
        context.close()
