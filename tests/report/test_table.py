from l2a.report.table import HEADERS, markdown_table, table_cells


def test_cells_are_percentages_with_intervals(rows):
    cells = table_cells(rows)
    assert cells[0] == ("tfidf_logreg", "70.0 (65.0 to 75.0)", "69.0 (64.0 to 74.0)", "1,234,567", "1.23", "0.50")
    assert all(len(row) == len(HEADERS) for row in cells)


def test_markdown_has_a_line_for_each_row_and_equal_columns(rows):
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {len(HEADERS) + 1}
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row.name for row in rows]
