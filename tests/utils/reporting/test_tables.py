"""utils/reporting/tables.py: one table in four notations, and what stands in its cells."""

from utils.reporting.tables import Table, mean_and_deviation

TABLE = Table(["method", "all"], [["MiB & AWT_1", "50.0 ± 1.0"], ["<b>", "1,5"]])


def test_markdown_is_aligned():
    assert TABLE.markdown().splitlines() == [
        "| method      | all        |",
        "| ----------- | ---------- |",
        "| MiB & AWT_1 | 50.0 ± 1.0 |",
        "| <b>         | 1,5        |",
    ]


def test_latex_escapes_its_commands():
    lines = TABLE.latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lc}" and lines[-1] == r"\end{tabular}"
    assert r"MiB \& AWT\_1 & 50.0 $\pm$ 1.0 \\" in lines


def test_csv_quotes_commas():
    assert TABLE.csv().splitlines() == ["method,all", "MiB & AWT_1,50.0 ± 1.0", '<b>,"1,5"']


def test_html_escapes_text():
    text = TABLE.html()
    assert "MiB &amp; AWT_1" in text and "&lt;b&gt;" in text and "<b>" not in text


def test_mean_and_sample_deviation():
    assert mean_and_deviation([40.0, 60.0]) == "50.0 ± 14.1"
    assert mean_and_deviation([40.0, None]) == "40.0"
    assert mean_and_deviation([None]) == mean_and_deviation([]) == "-"
