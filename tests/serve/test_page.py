"""The files of the page at `/`, without a browser."""

import re
from importlib.resources import files

import pytest
from serve_client import Server

FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}


def policy(value: str) -> dict[str, list[str]]:
    return {name: rest for name, *rest in (each.split() for each in value.split(";"))}


@pytest.mark.parametrize("path", FILES)
def test_a_file_needs_no_key_and_comes_with_strict_headers(server: Server, path: str) -> None:
    reply = server.ask(path, headers={"Authorization": ""})
    assert reply.status == 200
    headers = reply.headers
    assert headers["content-type"] == f"{FILES[path]}; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    rules = policy(headers["content-security-policy"])
    assert rules["default-src"] == ["'none'"]
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == ["'self'"]
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert not re.search(r"unsafe|:/|\*", headers["content-security-policy"])


def test_only_these_files_are_served_without_a_key(server: Server) -> None:
    names = {each.name for each in (files("tsqp.serve") / "page").iterdir() if each.is_file()}
    assert names == {"index.html", "page.css", "page.js"}
    for path in ("/index.html", "/page", "/page.js/", "//page.js", "/page/page.js", "/v1/models"):
        assert server.ask(path, headers={"Authorization": ""}).status == 401
        assert server.ask(path).status == (200 if path == "/v1/models" else 404)
    assert server.ask("/", {}, headers={"Authorization": ""}).status == 405


@pytest.mark.parametrize("path", FILES)
def test_nothing_in_a_file_is_loaded_from_outside(server: Server, path: str) -> None:
    text = server.ask(path).body.decode()
    assert len(text) > 1000
    assert not re.findall(r"\w+://|[\"'(]//|@import|url\(", text)
    for address in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert address in ("data:,", "page.css", "page.js")


def test_the_page_has_no_script_and_no_style_in_itself(server: Server) -> None:
    page = server.ask("/").body.decode()
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    script = server.ask("/page.js").body.decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b|document\.write", script)
    assert "localStorage" not in script  # a key is forgotten with its tab


def test_every_element_that_the_script_uses_is_on_the_page(server: Server) -> None:
    page, script = server.ask("/").body.decode(), server.ask("/page.js").body.decode()
    used = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert len(used) > 10
    assert used <= set(re.findall(r'\sid="([\w-]+)"', page))
