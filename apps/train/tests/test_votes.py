import signal

from titan_train.votes import Votes


def test_ranks_end_by_what_any_of_them_received():
    assert Votes(save=3, save_failed=1).ended_by is None
    assert Votes(by_hand=4).ended_by == signal.SIGINT
    assert Votes(by_hand=1, preempted=1).ended_by == signal.SIGTERM
