import pytest
import torch

from titan_core.config import ParallelConfig
from titan_core.parallelize import parallelize
from titan_core.roles import resolve_roles
from titan_core.tensor_styles import TensorStyleError, TensorStyles


@pytest.mark.parametrize(
    ("styles", "says"),
    [
        (TensorStyles(entered=["blocks.*.mlp"]), r"entered names blocks\.\*\.mlp, and the model has no region"),
        (TensorStyles(left=["nowhere"]), "left names nowhere, and the model has no row-cut layer"),
        (TensorStyles(added={"row": {"a": 0}}), "added has row; give colwise, rowwise or both"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(toy, toy_roles, styles, says):
    model = toy(torch.float32)
    with pytest.raises(TensorStyleError, match=says):
        parallelize(
            model,
            resolve_roles(model, toy_roles),
            None,
            ParallelConfig(),
            micro_batch_size=1,
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            styles=styles,
        )
