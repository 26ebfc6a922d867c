"""What MkDocs needs to make a site of pages that are written for GitHub too: see `mkdocs.yml`.

Pages that lie outside of `docs/` become pages of the site, and the links that lead to them there
lead to them here.
"""

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).parents[1]

# Pages that may not be written yet.
_OPTIONAL: Final = {"admin-page.md", "command.md"}

# Files of the repository, from its root, and the pages of the site that they are shown on.
_OUTSIDE: Final = {
    "README.md": "install.md",
    "CHANGELOG.md": "changelog.md",
    "sample_config.yaml": "sample-configuration.md",
}
# What the site does not have: of a link to it, the text stays.
_NAMED_ONLY: Final = ("contrib/", "tests/", "synapse_sticky/", "benchmarks/", "demo/")

_LINK: Final = re.compile(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
_MERMAID: Final = re.compile(r"```mermaid\nstateDiagram-v2\n(.*?)```", re.DOTALL)
_TRANSITION: Final = re.compile(r"\s*(\S+) --> ([^\s:]+)(?:: (.+))?")


def on_config(config: Any) -> Any:
    """Leave out of the navigation what is not written yet."""
    docs = Path(config.docs_dir)
    missing = {name for name in _OPTIONAL if not (docs / name).exists()}
    config.nav = _without(config.nav, missing)
    return config


def _without(nav: Any, missing: set[str]) -> Any:
    if isinstance(nav, list):
        return [kept for entry in nav if (kept := _without(entry, missing)) is not None]
    if isinstance(nav, dict):
        ((title, target),) = nav.items()
        kept = _without(target, missing)
        return None if kept is None else {title: kept}
    return None if nav in missing else nav


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files outside of `docs/`."""
    pages = {
        "install.md": _install((ROOT / "README.md").read_text(encoding="utf-8")),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "sample-configuration.md": _sample((ROOT / "sample_config.yaml").read_text("utf-8")),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _install(readme: str) -> str:
    """The part of README.md that says how to install the module, to use and to remove it."""
    begin, end = readme.index("## Install\n"), readme.index("## More\n")
    intro = (
        "# Install and configure\n\nIf you begin with nothing, the [tutorial](docs/tutorial.md) "
        "takes you from an empty machine to a call. If you have a Synapse, this is all you need."
        "\n\n"
    )
    return intro + readme[begin:end]


def _sample(text: str) -> str:
    return (
        "# Sample configuration\n\nAll options with their defaults, to copy from. "
        "[Options](docs/reference/options.md) has the same with the values that are allowed.\n\n"
        f"```yaml\n{text}```\n"
    )


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links for the repository into links for the site, and the diagram into a table."""
    source = page.file.src_uri
    at = posixpath.dirname(f"docs/{source}") if source not in _OUTSIDE.values() else "."

    def turn(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(at, path))
        if target in _OUTSIDE:
            target = _OUTSIDE[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target.startswith(_NAMED_ONLY):
            assert (ROOT / target).exists(), f"{source} links to {target}, which does not exist"
            return str(text)
        link = posixpath.relpath(target, posixpath.dirname(source) or ".")
        return f"[{text}]({link}{anchor or ''})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    # Code is left as it is, but for the diagram.
    parts[::2] = [_LINK.sub(turn, part) for part in parts[::2]]
    return _MERMAID.sub(lambda match: _table(match[1]), "".join(parts))


def _table(diagram: str) -> str:
    """A state diagram as a table: to draw it, a browser would need a very large script."""
    rows = ["| from | to | when |", "|---|---|---|"]
    before = None
    for line in diagram.splitlines():
        match = _TRANSITION.fullmatch(line)
        assert match is not None, line
        source, target, label = match.groups()
        source = "*begin*" if source == "[*]" else source
        shown = "" if source == before else source
        rows.append(f"| {shown} | {target} | {label or ''} |")
        before = source
    return "\n".join(rows)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Let names in tables be broken at their underscores, and nowhere else."""

    def with_breaks(match: re.Match[str]) -> str:
        return re.sub(r"(?<=_)(?=\w)", "<wbr>", match[0])

    return re.sub(r"(?<=<code>)\w+(?=</code>(?:</a>)?(?:(?!<td).)*?</td>)", with_breaks, html)


def on_post_build(config: Any) -> None:
    """Fail if a page would fetch anything from elsewhere."""
    for path in Path(config.site_dir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(
            r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"' >]+"
            r"|<link\b[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon)[^>]*//[^>]*",
            text,
        )
        if found:
            raise SystemExit(f"{path.name} fetches from elsewhere: {found}")
    for path in Path(config.site_dir).rglob("*.css"):
        if re.search(r"(url\(|@import )[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")):
            raise SystemExit(f"{path.name} fetches from elsewhere")
