"""The page at `/`: a chat with this server, and what the worker sees of it. It needs no key.

Its files load nothing from elsewhere, and the browser is told to allow nothing else.
"""

from importlib.resources import files

from fastapi import APIRouter, Response

router = APIRouter(include_in_schema=False)

FOLDER = files("tsqp.serve") / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _serve(path: str) -> None:
    name, media_type = PAGE_FILES[path]
    body = (FOLDER / name).read_bytes()

    async def page_file() -> Response:
        return Response(body, headers={**HEADERS, "Content-Type": media_type})

    router.add_api_route(path, page_file, response_class=Response)


for each in PAGE_FILES:
    _serve(each)
