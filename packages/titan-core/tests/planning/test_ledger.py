from titan_core.planning.ledger import Ledger, condensed


def test_the_peak_is_when_most_is_alive():
    ledger = Ledger({"parameters": 10})
    ledger.add("activations", 5)
    ledger.passing("communication", 7)
    ledger.add("activations", -5)
    ledger.add("gradients", 3)
    assert ledger.peak == {
        "parameters": 10,
        "gradients": 0,
        "optimizer": 0,
        "activations": 5,
        "communication": 7,
        "other": 0,
    }
    assert ledger.alive["gradients"] == 3


def test_a_segment_says_as_much_as_its_changes():
    changes = [("activations", 8), ("gradients", 4), ("activations", -6), ("gradients", 1), ("communication", -1)]
    one, other = Ledger({"communication": 1}), Ledger({"communication": 1})
    for category, amount in changes:
        one.add(category, amount)
    other.apply(condensed(changes))
    assert (one.peak, one.alive) == (other.peak, other.alive)
    assert sum(one.peak.values()) == 13
