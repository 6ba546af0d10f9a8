"""The page as a user has it, in headless Chromium."""

from collections.abc import Iterator

import pytest
from chromium import Chromium, find_chromium
from serve_client import KEY, Server

PROGRAM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert PROGRAM is not None
    with Chromium(PROGRAM, tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


def test_a_conversation_by_keyboard_with_a_key(chromium: Chromium, watched_server: Server) -> None:
    origin = f"http://127.0.0.1:{watched_server.port}/"
    chromium.look(1280, 800, "light")
    chromium.open(origin)
    chromium.until("document.activeElement.id === 'key'")  # the server has asked for it
    chromium.type("wrong")
    chromium.press("Enter")
    chromium.until("document.getElementById('key-wrong').textContent === 'The key is wrong.'")
    chromium.run("document.getElementById('key').focus()")
    chromium.type(KEY)
    chromium.press("Enter")
    chromium.until("document.getElementById('state').textContent === 'ready'")
    assert chromium.run("document.activeElement.id") == "text"
    assert chromium.run("document.getElementById('model').textContent") == "tiny"
    chromium.type("<b>Hello</b>")
    chromium.press("Enter")
    chromium.until("!document.getElementById('stop').hidden")
    chromium.until("document.querySelector('.assistant p').textContent.length > 3")
    chromium.until("!document.getElementById('views').hidden")
    chromium.press("Escape")
    chromium.until("document.getElementById('stop').hidden")
    assert chromium.run("document.querySelector('.user p').textContent") == "<b>Hello</b>"
    assert chromium.run("document.querySelector('.assistant .note').textContent") == "Stopped."
    assert chromium.run(_pixels("masked")) > 150  # different grey values
    assert chromium.run(_pixels("plain")) > 20
    assert chromium.run("document.getElementById('facts').textContent").startswith("Privacy mode")
    watched_server.settles(lambda: watched_server.running() == 0)  # it was given up
    chromium.type("Again")  # the focus has come back
    chromium.press("Enter")
    chromium.until("document.querySelectorAll('.assistant').length === 2")
    chromium.press("Escape")
    chromium.run("document.getElementById('new').click()")
    assert chromium.run("document.querySelectorAll('.message').length") == 0
    assert chromium.run("Object.keys(localStorage).length + document.cookie.length") == 0
    chromium.run("document.getElementById('forget').click()")
    chromium.until("!document.getElementById('key-form').hidden")
    assert chromium.run("sessionStorage.length") == 0
    _asked_nobody_else(chromium, origin)


def test_a_phone_has_the_panel_closed_and_nothing_wider_than_it(
    chromium: Chromium, watched_server: Server
) -> None:
    for scheme, light in (("light", True), ("dark", False)):
        chromium.look(390, 844, scheme)
        chromium.open(f"http://127.0.0.1:{watched_server.port}/")
        chromium.until("document.activeElement.id === 'key'")
        assert chromium.run("document.getElementById('worker').open") is False
        chromium.run("document.querySelector('summary').focus()")
        chromium.press("Enter")
        chromium.until("document.getElementById('worker').open")
        assert chromium.run("document.documentElement.scrollWidth") == 390
        assert chromium.run("document.documentElement.scrollHeight") == 844
        ground = chromium.run("getComputedStyle(document.body).backgroundColor")
        assert (int(ground.removeprefix("rgb(").split(",")[0]) > 128) is light


def test_without_a_worker_the_page_says_so(chromium: Chromium, server: Server) -> None:
    chromium.look(1280, 800, "dark")
    chromium.open(f"http://127.0.0.1:{server.port}/")
    chromium.until("document.activeElement.id === 'key'")
    chromium.type(KEY)
    chromium.press("Enter")
    chromium.until("document.getElementById('words').textContent.includes('There is no worker')")
    chromium.run("document.getElementById('text').focus()")
    chromium.type("x" * 5000)  # longer than the context
    chromium.press("Enter")
    chromium.until("document.querySelector('.note.bad')?.textContent.includes('tokens')")
    assert chromium.run("document.getElementById('views').hidden") is True
    assert len(chromium.run("document.getElementById('text').value")) == 5000  # to be changed
    assert chromium.run("document.documentElement.scrollHeight") == 800  # only the log scrolls


def _pixels(canvas: str) -> str:
    """The number of different grey values of a canvas."""
    return (
        f"(() => {{ const c = document.getElementById('{canvas}');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(d.filter((_, i) => i % 4 === 0)).size; })()"
    )


def _asked_nobody_else(chromium: Chromium, origin: str) -> None:
    requests = [each["request"]["url"] for each in chromium.happened("Network.requestWillBeSent")]
    assert len(requests) > 5
    assert not [url for url in requests if not url.startswith(origin) and url != "data:,"]
    assert not list(chromium.happened("Runtime.exceptionThrown"))
    entries = [each["entry"] for each in chromium.happened("Log.entryAdded")]
    assert [each for each in entries if each["source"] != "network"] == []  # no broken policy
