import dataclasses

from titan_data.loader_config import LoaderConfig
from titan_data.validation_config import ValidationConfig
from titan_train.config import DataSection, TrainConfig
from titan_train.configs.llama3 import llama3_debug
from titan_train.parts import differences, fingerprint, part_of, what_of


def replaced(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def mark(config):
    return fingerprint(what_of(config, "data"))


def test_every_field_belongs_to_exactly_one_part():
    config = llama3_debug()

    def leaves(values):
        return sum(leaves(v) if isinstance(v, dict) and v else 1 for v in values.values())

    def fields(dataclass):
        values = (getattr(dataclass, f.name) for f in dataclasses.fields(dataclass))
        return sum(fields(v) if dataclasses.is_dataclass(v) else 1 for v in values)

    assert sum(leaves(part_of(config, part)) for part in ("what", "how", "where")) == fields(config)


def test_how_and_where_leave_the_fingerprint_alone():
    config = llama3_debug()
    same = [
        replaced(config, "parallel", dp_shard=4, grad_sync="last"),
        replaced(config, "training", micro_batch_size=1, steps=9),
        replaced(config, "checkpoint", every=1),
        replaced(config, "metrics", log_every=1),
        replaced(config, "data", source="elsewhere", cache_dir="there", loader=LoaderConfig(workers=4)),
        replaced(config, "model", loss_chunk_tokens=1),
        dataclasses.replace(config, device="cpu", output="there"),
        dataclasses.replace(config, validation=ValidationConfig(sets={"held out": "there"})),
    ]
    assert {mark(c) for c in same} == {mark(config)}


def test_what_is_computed_changes_the_fingerprint():
    config = llama3_debug()
    other = [
        replaced(config, "training", seq_len=8),
        replaced(config, "training", global_batch_size=7),
        replaced(config, "training", seed=1),
        replaced(config, "optimizer", lr=1.0),
        replaced(config, "schedule", total_steps=7),
        replaced(config, "precision", param_dtype="bfloat16"),
        replaced(config, "model", dim=8),
        replaced(config, "data", shuffle=False),
    ]
    assert len({mark(c) for c in [config, *other]}) == len(other) + 1
    assert fingerprint(what_of(config, "other data")) != mark(config)


def test_differences_name_the_fields():
    config = llama3_debug()
    before = what_of(config, "a")
    now = what_of(replaced(config, "optimizer", lr=0.5), "b")
    assert differences(before, now) == ["data.fingerprint: a -> b", "optimizer.lr: 0.001 -> 0.5"]
    assert differences(before, before) == []


def test_parts_are_visible_in_the_configuration():
    what = part_of(llama3_debug(), "what")
    sections = {"model", "data", "training", "optimizer", "schedule", "guard", "precision", "quant", "lora", "replica"}
    assert set(what) == sections
    assert set(what["replica"]) == {"averaging"}
    assert "source" not in what["data"]
    how = part_of(llama3_debug(), "how")
    sections = {"model", "data", "training", "optimizer", "quant", "parallel", "remat", "compile", "device", "replica"}
    assert set(how) == sections
    assert isinstance(llama3_debug().data, DataSection)
    assert isinstance(llama3_debug(), TrainConfig)
