"""The page that says which test proves which requirement is right."""

from tests.conformance import listed_on_page, named_by_tests


def test_the_page_lists_what_tests_name() -> None:
    """Requirement by requirement the same tests; `python -m tests.conformance` writes them."""
    assert listed_on_page() == dict(named_by_tests())


def test_every_requirement_is_proved() -> None:
    """No requirement is on the page without a test."""
    assert [requirement for requirement, tests in listed_on_page().items() if not tests] == []
