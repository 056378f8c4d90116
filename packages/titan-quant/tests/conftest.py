import warnings
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def torchao() -> ModuleType:
    """torchao with the modules that the tests compare with; importing it warns, of its own syntax among others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao
        import torchao.float8.float8_linear
        import torchao.float8.float8_utils
        import torchao.prototype.moe_training.mxfp8_grouped_mm
        import torchao.prototype.moe_training.mxfp8_linear
        import torchao.prototype.mx_formats.mx_tensor
        import torchao.prototype.mx_formats.nvfp4_tensor
    return torchao
