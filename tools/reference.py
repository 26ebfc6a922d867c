"""The lists of the documentation that the code says itself: options, endpoints, metrics, log lines.

`python -m tools.reference` writes them into `docs/reference/`. A test fails if they are stale.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from prometheus_client import Counter, Gauge, Histogram
from synapse.module_api.errors import ConfigError

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.noticing.admission import HeldReason
from synapse_sticky.seams import metrics
from synapse_sticky.servers.debts import Reason

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = ROOT / "docs" / "reference"

# These log texts that other files name.
_LOG_FOR_OTHERS: Final = {"synapse_sticky.seams.failures", "synapse_sticky.hooks.guard"}

_WRITTEN: Final = "<!-- Written by `python -m tools.reference` from the code. -->\n\n"


# Options


def options() -> str:
    """Describe every option by its comment in `sample_config.yaml` and what the code accepts."""
    text = (ROOT / "sample_config.yaml").read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)["modules"][0]["config"]
    comments = dict(_comments(text))
    lines = [
        "# Options",
        "",
        "What may stand below `config` of the module in `homeserver.yaml`. Every option may be",
        "left out. The [sample configuration](../../sample_config.yaml) has all of them with their",
        "defaults, to copy from. A mistake stops Synapse at start-up with a message that names the",
        "option, the values that are allowed and the one that it got.",
        "",
        "| option | default |",
        "|---|---|",
        *(f"| {_link(f'`{name}`')} | {_in_short(value)} |" for name, value in defaults.items()),
    ]
    for name, value in defaults.items():
        lines += ["", f"## `{name}`", "", comments[name], ""]
        lines += [f"**Allowed:** {_allowed(name)}.", ""]
        block = _block_of(name)
        if block:
            lines += ["| in it | allowed |", "|---|---|"]
            lines += [f"| `{key}` | {_allowed(name, key)} |" for key in block]
            lines.append("")
        lines += ["**Default:**", "", "```yaml", *_as_yaml(name, value), "```"]
    return "\n".join([*lines, ""])


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """The comment above each option, as one text with its paragraphs."""
    comment: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"      # ?(.*)", line):
            comment.append(match[1])
        elif match := re.match(r"      (\w+):", line):
            yield match[1], "\n".join(comment)
            comment = []
        elif line.startswith("      #"):
            comment.append("")


def _allowed(name: str, key: str | None = None) -> str:
    """What the code says that it expects, when it gets something else."""
    value: Any = object() if key is None else {key: object()}
    try:
        StickyEventsConfig.parse({name: value})
    except ConfigError as error:
        expected = re.match(r"expected (.*), got ", error.msg)
        if expected is not None:
            return expected[1]
    raise AssertionError(f"{name} takes anything")


def _block_of(name: str) -> list[str]:
    """The options that an option has in it, if any."""
    try:
        StickyEventsConfig.parse({name: {"no such option": None}})
    except ConfigError as error:
        known = re.search(r"known options are (.*)$", error.msg)
        return known[1].split(", ") if known else []
    raise AssertionError(f"{name} takes anything")


def _as_yaml(name: str, value: object) -> list[str]:
    text = yaml.safe_dump({name: value}, sort_keys=False).replace("- - ", "- ")
    return text.rstrip().splitlines()


def _in_short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"`{key}: {_plain(part)}`" for key, part in value.items())
    return f"`{_plain(value)}`"


def _plain(value: object) -> str:
    return "null" if value is None else str(value)


# Endpoints


def endpoints() -> str:
    """Describe every endpoint of the admin API as its OpenAPI document does."""
    path = ROOT / "synapse_sticky" / "admin" / "openapi.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    (server,) = document["servers"]
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    lines = [
        "# Endpoints of the admin API",
        "",
        f"All are below `{server['url']}`. [The admin API](../admin-api.md) explains them, with",
        "examples. The same in a form for programs is the OpenAPI document itself, which the first",
        "endpoint answers.",
        "",
        "| | endpoint | |",
        "|---|---|---|",
    ]
    for method, path_, operation in operations:
        link = _link(f"{method} {path_}", f"`{path_}`")
        lines.append(f"| {method} | {link} | {operation['summary']} |")
    for method, path_, operation in operations:
        lines += _endpoint(document, method, path_, operation)
    lines += ["", "## Objects", "", "What bodies and answers consist of."]
    for name, schema in document["components"]["schemas"].items():
        lines += ["", f"### {name}", "", *_fields(document, schema)]
    return "\n".join([*lines, ""])


def _endpoint(
    document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> Iterator[str]:
    yield from ("", f"## {method} {path}", "")
    yield f"{operation['summary']}."
    if operation.get("security") == []:
        yield "It needs no access token."
    parameters = [_resolve(document, each) for each in operation.get("parameters", ())]
    if parameters:
        yield from ("", "| parameter | in | |", "|---|---|---|")
        for parameter in parameters:
            yield f"| `{parameter['name']}` | {parameter['in']} | {parameter['description']} |"
    if "requestBody" in operation:
        yield from ("", f"Body: {_of_type(document, _content(operation['requestBody']))}")
    yield from ("", "| answer | | |", "|---|---|---|")
    for status, response in operation["responses"].items():
        response = _resolve(document, response)
        kind = _of_type(document, _content(response))
        yield f"| {status} | {response['description']} | {kind} |"


def _content(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    (content,) = holder["content"].values()
    return dict(content["schema"]) if "schema" in content else {}


def _resolve(document: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Any = node
    while "$ref" in found:
        reference, found = found["$ref"], document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    return dict(found)


def _of_type(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(_of_type(document, part) for part in schema[choice])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_of_type(document, schema.get('items', {}))}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _fields(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    if "allOf" in schema:
        for part in schema["allOf"]:
            if "$ref" in part:
                yield from (f"All of {_of_type(document, part)}, and:", "")
            else:
                yield from _fields(document, part)
        return
    if "properties" not in schema:
        yield f"{schema.get('description', '')} ({_of_type(document, schema)})".strip()
        if isinstance(schema.get("additionalProperties"), dict):
            yield f"Each value: {_of_type(document, schema['additionalProperties'])}."
        return
    required = schema.get("required", [])
    yield from ("| field | type | |", "|---|---|---|")
    for name, field in schema["properties"].items():
        optional = "" if name in required else "Optional. "
        description = field.get("description", "").replace("\n", " ")
        yield f"| `{name}` | {_of_type(document, field)} | {optional}{description} |"


# Metrics


def metric_list() -> str:
    """List every metric as its definition says it."""
    lines = [
        "# Metrics, as the code defines them",
        "",
        "[Metrics](../metrics.md) says which processes measure each, and what the values tell.",
        "Every metric has the label `server_name` too.",
    ]
    found = [
        metric
        for metric in vars(metrics).values()
        if isinstance(metric, (Gauge, Counter, Histogram))
    ]
    for metric in found:
        suffix = "_total" if isinstance(metric, Counter) else ""
        lines += ["", f"## `{metric._name}{suffix}`", ""]
        lines += [f"{metric._type.capitalize()}. {metric._documentation}.", ""]
        for label in metric._labelnames:
            if label != "server_name":
                values = ", ".join(f"`{value}`" for value in _values(metric, label))
                lines += [f"- `{label}`: {values}"]
        if isinstance(metric, Histogram):
            buckets = ", ".join(f"{bound:g}" for bound in metric._upper_bounds[:-1])
            lines += [f"- buckets up to {buckets} seconds"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, ""]))


def _values(metric: Any, label: str) -> list[str]:
    if metric in metrics.LABELS:
        return list(metrics.LABELS[metric][label])
    if metric in (metrics.HELD_EVENTS, metrics.EXPIRED_WHILE_HELD):
        return [reason.value for reason in HeldReason]
    return [Reason.TRYING.value, Reason.BACKING_OFF.value]


# Log lines


_LEVELS: Final = {
    "error": "Something of ours failed",
    "warning": "Somebody should look",
    "info": "What happens",
    "debug": "Details",
}
_FAILURES: Final = {"shielded", "log_failure"}
_PLACE: Final = re.compile(r"%(?:\.\d+)?[sdrf]")


def log_lines() -> str:
    """List every line that the module can write into Synapse's log."""
    found: dict[str, set[tuple[str, str]]] = {level: set() for level in _LEVELS}
    for path in sorted((ROOT / "synapse_sticky").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for level, text in _logged(ast.parse(path.read_text(encoding="utf-8"))):
            if text is not None:
                found[level].add((text, name))
            else:
                assert name in _LOG_FOR_OTHERS, f"{name} logs a text that is not found"
    lines = [
        "# Log lines",
        "",
        "Every line that the module writes into Synapse's log, by its level. An `…` stands for",
        "the part that differs each time: search your log for the words around it. The names of",
        "the loggers all begin with `synapse_sticky`, so this in Synapse's `log_config` is for all",
        "of them:",
        "",
        "```yaml",
        "loggers:",
        "  synapse_sticky:",
        "    level: DEBUG",
        "```",
        "",
        "The same error is logged once a minute at most, with a traceback unless the database just",
        "does not answer.",
    ]
    for level, title in _LEVELS.items():
        lines += ["", f"## {level.upper()}: {title.lower()}", ""]
        lines += ["| line | logger |", "|---|---|"]
        lines += [f"| {_cell(text)} | `{name}` |" for text, name in sorted(found[level])]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    text = _PLACE.sub("…", text).replace("%%", "%").replace("|", "\\|")
    # But for what stands in backticks.
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _logged(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """The level and the text of each line that a file logs; None if it is not a plain text."""
    constants = {
        target.id: value
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and (value := _text(node.value, {})) is not None
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        level = called.removeprefix("logger.")
        if called in _FAILURES or called.endswith("guard.bounded"):
            level = "error"
        elif level not in _LEVELS or called == level:
            continue
        text = _text(node.args[0], constants)
        has_words = text is not None and re.search("[a-z]", _PLACE.sub("", text))
        yield level, text if has_words else None


def _text(node: ast.expr | None, constants: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "%s" for part in node.values)
        return "".join(map(str, parts))
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    return None


# The pages


def _link(heading: str, text: str | None = None) -> str:
    """A link to a heading of the same page."""
    # As GitHub and the site name it.
    anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    return f"[{text or heading}](#{anchor})"


GENERATED: Final[dict[str, Callable[[], str]]] = {
    "options.md": options,
    "endpoints.md": endpoints,
    "metrics.md": metric_list,
    "log.md": log_lines,
}


def written(name: str) -> str:
    """Return the text of a page as the code says it now."""
    return _WRITTEN + GENERATED[name]()


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for page in GENERATED:
        (PAGES / page).write_text(written(page), encoding="utf-8")
