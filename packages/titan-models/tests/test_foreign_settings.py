from titan_models.foreign_settings import mistyped


def test_each_kind_admits_what_it_is_and_null_only_where_it_may_be():
    values = {"a": 1, "b": 0.0, "c": False, "d": None, "e": None, "f": True, "g": 0, "h": float("inf"), "i": 1}
    found = mistyped(
        values, whole=("a", "d", "f", "g", "absent"), numbers=("b", "e", "h"), flags=("c", "i"), optional=("d",)
    )
    assert found == [
        "f is True, and a whole number of at least 1 is expected",
        "g is 0, and a whole number of at least 1 is expected",
        "e is None, and a number of at least 0 is expected",
        "h is inf, and a number of at least 0 is expected",
        "i is 1, and true or false is expected",
    ]
