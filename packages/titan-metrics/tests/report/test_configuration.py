from titan_metrics.report.configuration import by_section, flat, rows


def test_nested_settings_become_flat():
    assert flat({"type": "pkg.mod:Top", "a": 1, "b": {"c": [1, 2], "d": {}, "e": "text"}, "n": None}) == {
        "type": "Top",
        "a": "1",
        "b.c": "[1, 2]",
        "b.d": "{}",
        "b.e": "text",
        "n": "null",
    }


def test_runs_are_compared_row_by_row():
    found = {row.name: (row.values, row.differs) for row in rows([{"a": 1, "b": 2}, {"a": 1, "c": 3}, None])}
    assert found == {
        "a": (["1", "1", None], True),
        "b": (["2", None, None], True),
        "c": ([None, "3", None], True),
    }
    assert not rows([{"a": 1}, {"a": 1}])[0].differs


def test_rows_are_put_under_their_section():
    found = by_section(rows([{"z": {"y": 1}, "seed": 1}]))
    assert {name: [row.name for row in rows_] for name, rows_ in found.items()} == {"": ["seed"], "z": ["z.y"]}
