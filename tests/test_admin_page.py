"""The files of the page for admins, as they are served; tests/browser is about what they do."""

import re
from html.parser import HTMLParser
from importlib.resources import files

import httpx
import pytest

import synapse_sticky.admin
from harness.client import Client
from harness.homeserver import Homeserver

API = "/_synapse/client/synapse_sticky/admin/v1"
STATIC = files(synapse_sticky.admin).joinpath("static")
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
NAMES = sorted(path.name for path in STATIC.iterdir())

pytestmark = pytest.mark.repeats("postgres")


def address(name: str) -> str:
    """Where a file is, below the server's address."""
    return f"{API}/page" if name == "index.html" else f"{API}/page/{name}"


def urls(homeserver: Homeserver) -> list[str]:
    """The addresses of the processes that serve clients."""
    return sorted({homeserver.main_url, *homeserver.client_urls})


@pytest.mark.parametrize("name", NAMES)
def test_each_file(homeserver: Homeserver, name: str) -> None:
    """Every process serves it to anybody, with its type and with what makes browsers careful."""
    content = STATIC.joinpath(name).read_bytes()
    for url in urls(homeserver):
        response = homeserver.http.get(url + address(name))
        assert (response.status_code, response.content) == (200, content)
        headers = response.headers
        assert headers["Content-Type"] == TYPES[name.rpartition(".")[2]]
        assert headers["Content-Length"] == str(len(content))
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-cache"
        # Other sites have no business with it.
        assert "Access-Control-Allow-Origin" not in headers
        assert "Set-Cookie" not in headers
        head = homeserver.http.head(url + address(name))
        assert (head.status_code, head.content) == (200, b"")
        for same in ("Content-Type", "Content-Length", "ETag", "Content-Security-Policy"):
            assert head.headers[same] == headers[same]


def test_the_policy(homeserver: Homeserver) -> None:
    """Nothing comes from elsewhere, nothing is inline, and no text becomes markup."""
    response = homeserver.http.get(homeserver.main_url + address("index.html"))
    policy = dict(
        directive.split(" ", 1)
        for directive in response.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    for directive in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[directive] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["trusted-types"] == "'none'"
    assert "unsafe" not in response.headers["Content-Security-Policy"]


def test_etags(homeserver: Homeserver) -> None:
    """A browser that has a file is not sent it again, until it is another one."""
    tags = set()
    for name in NAMES:
        url = homeserver.main_url + address(name)
        tag = homeserver.http.get(url).headers["ETag"]
        tags.add(tag)
        same = homeserver.http.get(url, headers={"If-None-Match": tag})
        assert (same.status_code, same.content) == (304, b"")
        assert same.headers["ETag"] == tag
        assert "Content-Security-Policy" in same.headers
        other = homeserver.http.get(url, headers={"If-None-Match": '"other"'})
        assert (other.status_code, other.headers["ETag"]) == (200, tag)
        assert other.content == STATIC.joinpath(name).read_bytes()
    assert len(tags) == len(NAMES)


def test_with_a_slash_behind_it(homeserver: Homeserver) -> None:
    """Whoever types one gets to the page, whatever prefix there is."""
    response = homeserver.http.get(f"{homeserver.main_url}{API}/page/")
    assert (response.status_code, response.headers["Location"]) == (308, "../page")
    url = httpx.URL(f"https://example.com/matrix{API}/page/").join(response.headers["Location"])
    assert str(url) == f"https://example.com/matrix{API}/page"


@pytest.mark.parametrize(
    "path",
    [
        "page/nothing.js",
        "page/index.html",
        "page/stylexcss",
        "page//style.css",
        "page/style.css/",
        "page/style.css%00",
        "page/STYLE.CSS",
        "page/../page.py",
        "page/..%2fpage.py",
        "page/%2e%2e/api.py",
        "page/%2e%2e%2f%2e%2e%2fprotocol.py",
        "page/..%5cpage.py",
        "page/%2fetc%2fpasswd",
        "page//etc/passwd",
        "pages",
        "page.py",
    ],
)
def test_other_names(homeserver: Homeserver, path: str) -> None:
    """There is nothing but the files, however a path is written."""
    # By hand: a client would tidy the path up.
    request = httpx.Request("GET", homeserver.main_url)
    request.url = request.url.copy_with(raw_path=f"{API}/{path}".encode())
    response = homeserver.http.send(request)
    assert response.status_code == 404
    assert response.json()["errcode"] == "M_UNRECOGNIZED"


@pytest.mark.repeats("workers")
def test_other_methods(homeserver: Homeserver) -> None:
    """The page is to be read only."""
    for method in ("POST", "PUT", "DELETE"):
        for name in ("index.html", "main.js"):
            response = homeserver.http.request(method, homeserver.main_url + address(name))
            assert (response.status_code, response.json()["errcode"]) == (405, "M_UNRECOGNIZED")


@pytest.mark.repeats("workers")
def test_a_token_makes_no_difference(homeserver: Homeserver, alice: Client) -> None:
    """The page holds no data, and looks at no token."""
    url = homeserver.main_url + address("index.html")
    plain = homeserver.http.get(url).content
    for token in (alice.access_token, "nonsense"):
        response = homeserver.http.get(url, headers={"Authorization": f"Bearer {token}"})
        assert (response.status_code, response.content) == (200, plain)


# The files themselves


class _Document(HTMLParser):
    """The addresses in a page, and what is inline."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        for name, value in attrs:
            if name in ("src", "href", "action"):
                self.addresses.append(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(name)

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style") and data.strip():
            self.inline.append(data)


def _text(name: str) -> str:
    return STATIC.joinpath(name).read_text(encoding="utf-8")


def test_nothing_is_inline_or_elsewhere() -> None:
    """Addresses are relative to those of the files, so that they work behind any prefix."""
    document = _Document()
    document.feed(_text("index.html"))
    assert document.inline == []
    assert document.addresses
    for found in document.addresses:
        assert found.startswith(("page/", "#/")), found
        assert found.startswith("#/") or found.removeprefix("page/") in NAMES
    for name in NAMES:
        elsewhere = re.findall(r"https?://[^\"' ]+", _text(name))
        assert elsewhere in ([], ["http://www.w3.org/2000/svg"]), name
        assert "@import" not in _text(name)
        assert "url(" not in _text(name)


def test_no_text_is_read_as_markup() -> None:
    """As the policy says, in browsers too that do not know that part of it."""
    for name in NAMES:
        if name.endswith(".js"):
            for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
                assert word not in _text(name), (name, word)
            # What a link leads to is an address of ours.
            assert "localStorage" not in _text(name)
            assert "cookie" not in _text(name)


def test_every_module_is_there() -> None:
    """An import names a file, and each file is used."""
    used = {"index.html", "main.js", "style.css", "icon.svg"}
    for name in NAMES:
        imported = set(re.findall(r"from \"\./([^\"]+)\"", _text(name)))
        assert imported <= set(NAMES), name
        used |= imported
    assert used == set(NAMES)
