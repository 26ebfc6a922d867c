"""Draws the table of a payment's states into docs/architecture.md.

`python -m tests.diagram` rewrites the diagram; a test fails if it is stale.
"""

from pathlib import Path

from synapse_sticky.servers.payment import TRANSITIONS, Outcome, State

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
_BEGIN = "<!-- The payment, drawn by `python -m tests.diagram` -->\n"
_END = "<!-- End of the payment -->\n"


def drawn() -> str:
    """Return the diagram and the meaning of the states, as the table says them."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> SETTLED"]
    for state, outcomes in TRANSITIONS.items():
        labels: dict[State, list[str]] = {}
        for outcome, after in outcomes.items():
            # From each state, and told in words.
            if outcome is not Outcome.JOINED:
                labels.setdefault(after, []).append(outcome.value)
        lines += [
            f"    {state.name} --> {after.name}: {', '.join(texts)}"
            for after, texts in labels.items()
        ]
    lines += ["```", "", "| state | meaning |", "|---|---|"]
    lines += [f"| {state.name} | {state.value} |" for state in State]
    return "\n".join(["", *lines, "", ""])


def on_page() -> str:
    """Return what the page has."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    found, end, _ = rest.partition(_END)
    assert end, "the page has lost the marks between which the diagram stands"
    return found


def write() -> None:
    """Replace the diagram on the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(_BEGIN + on_page(), _BEGIN + drawn()), encoding="utf-8")


if __name__ == "__main__":
    write()
