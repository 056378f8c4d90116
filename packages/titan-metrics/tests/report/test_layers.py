from titan_metrics.report.layers import layers
from titan_metrics.report.run import open_runs


def test_norms_are_shown_by_layer(make_run):
    (found,) = layers(open_runs([make_run()]))
    assert [row.name for row in found.rows] == ["layers.0", "layers.1"]
    row = found.rows[0]
    assert (row.gradient, row.parameter, row.update, row.ratio) == ("0.5167", "20", "0.02", "0.001")
    assert [point.split(",")[0] for point in row.spark.split()] == ["0.0", "60.0", "120.0"]
    assert found.left_out == 0


def test_runs_without_norms_are_left_out(bare_run):
    assert layers(open_runs([bare_run])) == []
