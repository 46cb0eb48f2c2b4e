"""docs/departures.md: every row is complete and names tests that exist."""

import ast
import re
from functools import cache

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "departures.md").read_text()
HEADER = ["matter", "official", "here", "why", "test"]
#: Rows whose tests are about to be written. Strict: once a test exists, its entry fails and must be removed.
PENDING: set[str] = set()


def cells(line):
    """The cells of a line of a table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables():
    """Every table of the page: its header, and its rows."""
    found = re.findall(r"^(\|.*)\n\|[ |-]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    return [(cells(header), [cells(row) for row in rows.splitlines()]) for header, rows in found]


def rows():
    return [row for _, rows_of_table in tables() for row in rows_of_table]


def named_tests(row):
    """The tests in the last cell of a row, as "file::name" or "file::class::name"."""
    return re.findall(r"`(tests/[\w/]+\.py(?:::\w+)+)`", row[-1])


@cache
def functions_of(path):
    """Names of the tests of a file, those of classes with the class before them."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if name.rpartition(":")[2].startswith("test_")}


def test_the_tables_have_one_form():
    assert [header for header, _ in tables()] == [HEADER] * len(re.findall(r"^## ", PAGE, flags=re.MULTILINE))
    assert len(rows()) == len([line for line in PAGE.splitlines() if line.startswith("|")]) - 2 * len(tables())


def test_no_matter_has_two_rows():
    matters = [row[0] for row in rows()]
    assert len(matters) == len(set(matters))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_is_complete(row):
    assert len(row) == len(HEADER) and all(row), row
    assert named_tests(row), f"{row[0]}: the last cell names no test"
    assert re.sub(r"`tests/[\w/]+\.py(?:::\w+)+`|[, ]", "", row[-1]) == "", f"{row[0]}: {row[-1]} is more than tests"


@pytest.mark.parametrize(
    "test",
    [
        pytest.param(test, marks=pytest.mark.xfail(strict=True) if test in PENDING else ())
        for test in sorted({test for row in rows() for test in named_tests(row)})
    ],
)
def test_a_named_test_exists(test):
    path, _, name = test.partition("::")
    assert (ROOT / path).is_file(), f"docs/departures.md names {path}"
    assert name in functions_of(path), f"{path} has no test {name}"
