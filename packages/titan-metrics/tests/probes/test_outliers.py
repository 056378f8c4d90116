from titan_metrics.probes.outliers import Reading, find_apart, find_slow


def test_a_rank_is_slow_if_it_is_below_the_median_by_more_than_the_share():
    rates = [
        Reading(probe="matmul", unit="FLOP/s", values=(100.0, 79.9, 100.0, 300.0)),
        Reading(probe="copy", unit="B/s", values=(80.0, 100.0, 100.0, 50.0)),
    ]
    assert [(found.probe, found.rank) for found in find_slow(rates)] == [("copy", 3), ("matmul", 1)]
    assert [(found.probe, found.rank) for found in find_slow(rates, share=0.4)] == [("copy", 3)]
    assert find_slow(rates)[0].median == 90.0


def test_of_two_the_slower_one_is_named():
    (found,) = find_slow([Reading(probe="matmul", unit="FLOP/s", values=(100.0, 50.0))])
    assert (found.rank, found.value, found.median) == (1, 50.0, 75.0)


def test_ranks_that_are_alike_and_ranks_alone_are_not_slow():
    assert (
        find_slow(
            [Reading(probe="a", unit="B/s", values=(5.0, 5.1, 4.9)), Reading(probe="b", unit="B/s", values=(1.0,))]
        )
        == []
    )


def test_far_from_the_median_on_either_side():
    clocks = Reading(probe="clock", unit="s", values=(0.0, 0.2, 0.01, -1.0, 0.0))
    assert [found.rank for found in find_apart(clocks, bound=0.1)] == [3, 1]
    assert find_apart(clocks, bound=2.0) == []
