import re

from l2a.report.run_folder import HEADERS, markdown_table, table_cells


def test_cells_are_percentages_with_intervals(rows):
    name, accuracy, macro_f1, _, *latency = table_cells(rows)[0]
    assert name == "tfidf_logreg"
    assert re.findall(r"\d+\.\d", accuracy) == ["70.0", "65.0", "75.0"]
    assert re.findall(r"\d+\.\d", macro_f1) == ["69.0", "64.0", "74.0"]
    assert latency == ["1.23±0.10", "0.50±0.02"]
    assert all(len(cells) == len(HEADERS) for cells in table_cells(rows))


def test_markdown_has_a_line_for_each_row_and_equal_columns(rows):
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {len(HEADERS) + 1}
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row.name for row in rows]
