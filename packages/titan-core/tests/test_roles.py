import subprocess
import sys

import pytest
from torch import nn

from titan_core.roles import RoleError, matches, resolve_roles, role_of_parameter


def test_a_star_stands_for_one_part():
    assert matches("layers.*.up", "layers.0.up")
    assert matches("*_norm", "ffn_norm")
    assert not matches("layers.*", "layers.0.up")
    assert not matches("layers.*.up", "layers.0.upper")


def test_roles_of_the_toy_model(toy, toy_roles):
    roles = resolve_roles(toy(), toy_roles)
    assert roles["layers.1"] == "block"
    assert role_of_parameter("layers.0.mix.up.bias", roles) == "colwise"
    assert role_of_parameter("embed.weight", roles) == "embedding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "haed"}, "unknown role 'haed'.*Did you mean 'head'"),
        ({"layers.*.gate": "colwise"}, r"No module of the model matches the role patterns \['layers.\*.gate'\]"),
        ({"layers.*.mix": "norm"}, "'layers.0.mix.up' is colwise but lies in no region"),
        ({"layers.0.mix.up": "rowwise"}, "'layers.0.mix.up' has the roles .*overlap"),
    ],
)
def test_roles_that_do_not_fit_are_refused(toy, toy_roles, change, message):
    with pytest.raises(RoleError, match=message):
        resolve_roles(toy(), toy_roles | change)


def test_a_module_with_parameters_and_no_role_is_refused(toy, toy_roles):
    model = toy()
    model.layers["1"].gate = nn.Linear(2, 2)
    with pytest.raises(RoleError, match=r"'layers\.1\.gate' holds parameters but has no role"):
        resolve_roles(model, toy_roles)


def test_the_table_can_be_read_without_torch():
    code = "import sys, titan_core.roles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
