"""The launchers' YAML files, held against what reads them: SkyPilot itself, and the types of JobSet and Kubernetes."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.launchers, pytest.mark.filterwarnings("ignore")]

SCRIPTS = Path(__file__).parents[1] / "scripts"


def unknown(given, understood, path="job"):
    """Where `given` has what the types did not take over."""
    if isinstance(given, dict):
        understood = understood if isinstance(understood, dict) else {}
        return [
            name
            for key, value in given.items()
            for name in (unknown(value, understood[key], f"{path}.{key}") if key in understood else [f"{path}.{key}"])
        ]
    if isinstance(given, list):
        pairs = zip(given, understood, strict=True)
        return [name for i, (one, other) in enumerate(pairs) for name in unknown(one, other, f"{path}[{i}]")]
    return [] if given == understood else [path]


def as_a_job_set(text):
    import yaml
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    given = yaml.safe_load(text)
    return unknown(given, JobsetV1alpha2JobSet.from_dict(given).to_dict())


def test_kubernetes_understands_every_field():
    text = (SCRIPTS / "kubernetes.yaml").read_text()
    assert as_a_job_set(text) == []
    assert as_a_job_set(text.replace("backoffLimit", "backofLimit")) == [
        "job.spec.replicatedJobs[0].template.spec.backofLimit"
    ]
    with pytest.raises(ValueError, match="completions"):
        as_a_job_set(text.replace("completions: 2", "completions: two"))


def test_skypilot_understands_every_field(tmp_path):
    import sky

    task = sky.Task.from_yaml(str(SCRIPTS / "skypilot.yaml"))
    assert task.num_nodes == 2
    assert all(resources.use_spot for resources in task.resources)
    assert {resources.job_recovery["recover_on_exit_codes"][0] for resources in task.resources} == {75}
    assert task.storage_mounts["/bucket"].name == "my-titan-bucket"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((SCRIPTS / "skypilot.yaml").read_text().replace("num_nodes", "num_node"))
    with pytest.raises(ValueError, match="num_node"):
        sky.Task.from_yaml(str(wrong))
