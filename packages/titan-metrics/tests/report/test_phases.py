from titan_metrics.report.phases import COLORS, colors, in_order


def test_usual_phases_come_first_and_keep_their_colors():
    assert in_order(["zeta", "other", "alpha", "optimizer"]) == ["optimizer", "other", "alpha", "zeta"]
    assert colors(["optimizer", "x"])["optimizer"] == colors(["a", "b", "optimizer"])["optimizer"] == 1


def test_others_get_colors_of_their_own():
    found = colors(["forward_backward", "other", "a", "b", "c", "d", "e", "f"])
    assert len(set(found.values())) == 8
    assert max(colors(map(str, range(50))).values()) < COLORS
