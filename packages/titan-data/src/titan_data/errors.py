"""Errors for data that cannot be used as it is."""


class DataError(ValueError):
    """A corpus, a tokenizer or a cache cannot be used; the message names the place, the reason and the remedy."""


class NotFoundError(DataError, FileNotFoundError):
    """A corpus or a tokenizer is not where the configuration says; the message names the place."""
