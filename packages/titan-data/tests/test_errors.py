import pickle

import pytest

from titan_data.errors import DataError, MissingPackageError, NotFoundError, about, import_extra


def test_a_package_that_is_missing_is_named_with_its_extra():
    assert import_extra("json.decoder", extra="x", purpose="y").JSONDecodeError
    with pytest.raises(ImportError, match=r"reading .x files takes the package no_such_package.*titan-data\[x\]"):
        import_extra("no_such_package.part", extra="x", purpose="reading .x files")


@pytest.mark.parametrize("kind", [DataError, NotFoundError, MissingPackageError])
def test_errors_cross_processes_whole(kind):
    error = pickle.loads(pickle.dumps(kind("a.jsonl, line 7: not JSON")))
    assert type(error) is kind
    assert str(error) == "a.jsonl, line 7: not JSON"


@pytest.mark.parametrize("kind", [DataError, NotFoundError, MissingPackageError])
def test_an_error_can_be_given_what_it_is_about(kind):
    with pytest.raises(kind, match=r"^validation\.sets news: not there$"), about("validation.sets news"):
        raise kind("not there")
    with pytest.raises(RuntimeError, match=r"^else$"), about("validation.sets news"):
        raise RuntimeError("else")
