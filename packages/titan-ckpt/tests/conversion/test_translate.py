"""From headers to published folders: plans, problems, interruptions and object stores, on a model of four tensors."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.conversion.journal import FOLDER
from titan_ckpt.conversion.keymap import ModelFacts
from titan_ckpt.conversion.layouts import SEAL_NAME
from titan_ckpt.conversion.plan import Plan, UnfitSourceError, run
from titan_ckpt.conversion.translate import (
    Native,
    carried_files,
    from_dcp,
    from_hugging_face,
    from_meta,
    to_dcp,
    to_hugging_face,
    to_meta,
)
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats import dcp_folder
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.location import place_of

HF = {"embed": "model.embed", "layers.*.w": ("model.*.w", "rotary"), "head": ("lm_head", "untied")}
META = {"embed": ("tok", "split 0"), "layers.*.w": ("l.*.w", "split 1"), "head": ("output", "split 0")}
FACTS = ModelFacts(
    shapes={"embed": (12, 8), "layers.0.w": (8, 4), "layers.1.w": (8, 4)}, shared={"head": "embed"}, head_dim=4
)
FILES = {"model.json": b"{}", "tokenizer.json": b"[]"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed": (12, 8), "model.0.w": (8, 4), "model.1.w": (8, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("[]")
    return folder


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few rows and several files, as a large model would have."""
    original = LazyTensor.pieces
    monkeypatch.setattr(LazyTensor, "pieces", lambda self, limit=64: original(self, min(limit, 64)))
    monkeypatch.setattr(dcp_folder, "FILE_BYTES", 200)


def plan_dcp(hf: Path, dst: object, **options: object) -> Plan:
    return to_dcp(from_hugging_face(hf, HF, FACTS), dst, files=FILES, **options)


def same(one: Path, other: dict[str, torch.Tensor]) -> bool:
    found = {name: tensor for path in one.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return found.keys() == other.keys() and all(torch.equal(found[name], other[name]) for name in other)


@pytest.mark.usefixtures("small_pieces")
def test_there_and_back_over_all_formats_changes_no_bit(hf: Path, tmp_path: Path) -> None:
    run(plan_dcp(hf, tmp_path / "step-3"))
    run(to_meta(from_dcp(tmp_path / "step-3", None, FACTS), tmp_path / "meta", keys=META, files={}, shards=2))
    run(to_dcp(from_meta(tmp_path / "meta", META, FACTS), tmp_path / "again"))
    plan = to_hugging_face(
        from_dcp(tmp_path / "again", None, FACTS), tmp_path / "out", keys=HF, files={}, shard_bytes=400
    )
    run(plan)
    assert same(tmp_path / "out", tensors())
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "step-3", "meta", "again", "out"}


def test_the_result_is_a_checkpoint_that_a_model_loads(hf: Path, tmp_path: Path) -> None:
    run(plan_dcp(hf, tmp_path / "step-3"))
    found = Checkpointer(tmp_path).newest_whole()
    assert found is not None
    assert (found.step, found.manifest.state, set(found.files)) == (3, ("model",), set(FILES))
    assert found.read_file("model.json") == b"{}"
    assert found.meta["converted_from"] == str(hf)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Parameter(torch.zeros(12, 8))
            self.head = self.embed
            self.layers = torch.nn.ModuleDict({str(i): torch.nn.Module() for i in range(2)})
            for layer in self.layers.values():
                layer.w = torch.nn.Parameter(torch.zeros(8, 4))

    model = Model()
    Checkpointer(tmp_path).load(found, {"model": model})
    assert torch.equal(model.embed, tensors()["model.embed"])
    assert model.layers["1"].w.abs().min() > 0


def test_names_may_stand_without_an_object(hf: Path, tmp_path: Path) -> None:
    run(plan_dcp(hf, tmp_path / "plain", keys=META, under=None))
    native = from_dcp(tmp_path / "plain", META, FACTS, under=None)
    assert native.problems == ()
    assert "tok" in native.collection.tensors


def test_a_training_runs_other_state_is_not_the_models(tmp_path: Path) -> None:
    class Box(dict):
        def state_dict(self) -> dict:
            return dict(self)

        def load_state_dict(self, state: dict) -> None:
            self.update(state)

    ours = {"embed": torch.ones(12, 8), "head": torch.ones(12, 8), "layers": {n: {"w": torch.ones(8, 4)} for n in "01"}}
    Checkpointer(tmp_path).save(1, {"model": Box(ours), "optimizer": Box({"embed": torch.zeros(1)})})
    assert from_dcp(tmp_path / "step-1", None, FACTS).problems == ()


def test_every_problem_is_told_before_anything_is_written(hf: Path, tmp_path: Path) -> None:
    save_file({**tensors(), "model.0.w": torch.ones(2), "what": torch.ones(1)}, hf / "model.safetensors")
    save_file({}, hf / "old.safetensors")
    plan = plan_dcp(hf, tmp_path / "out")
    assert len(plan.problems) == 3
    with pytest.raises(UnfitSourceError) as raised:
        run(plan)
    for words in ("model.0.w in model.safetensors is [2]", "what in model.safetensors", "old.safetensors is left over"):
        assert words in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_the_cause_comes_first_and_many_names_are_counted(hf: Path, tmp_path: Path) -> None:
    many = {f"layers.{i}.w": torch.ones(8, 4) for i in range(20)}
    facts = ModelFacts(shapes=dict.fromkeys(many, (8, 4)), head_dim=4)
    save_file({name.replace("layers", "model"): tensor for name, tensor in many.items()}, hf / "model.safetensors")
    run(to_dcp(from_hugging_face(hf, HF, facts), tmp_path / "theirs", keys=META, under=None))

    def message(native: Native) -> str:
        with pytest.raises(UnfitSourceError) as raised:
            run(to_dcp(native, tmp_path / "out"))
        assert len(raised.value.problems) > 20
        assert str(raised.value).count("is missing in") <= 8
        return str(raised.value).partition("nothing was written. ")[2]

    forgotten = message(from_dcp(tmp_path / "theirs", None, facts))
    assert forgotten.startswith("20 of the 20 names of this model are not there: they are those of another project")
    assert "--keys and --config" in forgotten
    assert forgotten.endswith("and 13 more.")
    assert message(from_dcp(tmp_path / "theirs", None, facts, under=None)).startswith("20 of the 20 names")
    other = ModelFacts(shapes={f"layers.{i}.w": (8, 4) for i in range(90)}, head_dim=4)
    assert message(from_hugging_face(hf, HF, other)).startswith("70 of the 90 names of this model are not there")

    (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-1])
    assert message(from_hugging_face(hf, HF, facts)).startswith("model.safetensors is no whole safetensors file")
    (hf / "model.safetensors").rename(hf / "model-00001-of-00002.safetensors")
    alone = message(from_hugging_face(hf, HF, facts))
    assert alone.startswith("model.safetensors.index.json is missing, without which nobody can tell what goes with ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_source_or_the_one_asked_for(hf: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    run(plan_dcp(hf, tmp_path / "step-0", dtype=dtype))
    native = from_dcp(tmp_path / "step-0", None, FACTS)
    assert {tensor.dtype for tensor in native.collection.tensors.values()} == {dtype}
    run(to_hugging_face(native, tmp_path / "out", keys=HF, files={}))
    assert same(tmp_path / "out", {name: tensor.to(dtype) for name, tensor in tensors().items()})


def test_the_seal_has_every_file_with_its_hash(hf: Path, tmp_path: Path) -> None:
    plan = to_hugging_face(from_hugging_face(hf, HF, FACTS), tmp_path / "out", keys=HF, files=carried_files(hf))
    run(plan, prove=lambda work: {"check": str(sorted(work.files()))})
    body = json.loads((tmp_path / "out" / SEAL_NAME).read_text())
    assert body["files"].keys() == {"model.safetensors", "config.json", "tokenizer.json"}
    assert "tokenizer.json" in body["meta"]["check"]


def test_a_proof_that_fails_publishes_nothing_and_keeps_the_work(hf: Path, tmp_path: Path) -> None:
    def fails(work: object) -> dict:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        run(plan_dcp(hf, tmp_path / "out"), prove=fails)
    assert not (tmp_path / "out").exists()
    assert run(plan_dcp(hf, tmp_path / "out"), prove=lambda work: {"check": 1}) > 0
    assert open_checkpoint(tmp_path / "out").meta["check"] == 1


# ---- interruptions


def _killed_at(write: int, plan: Plan) -> None:
    """Runs a plan in a child process that kills itself before a given write of any file."""

    def child() -> None:
        from titan_ckpt.storage import HashingFile

        original, count = HashingFile.write, 0

        def counted(self: HashingFile, data: object) -> int:
            nonlocal count
            count += 1
            if count == write:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, data)

        HashingFile.write = counted
        run(plan)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)


@pytest.mark.usefixtures("small_pieces")
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(hf: Path, tmp_path: Path) -> None:
    run(plan_dcp(hf, tmp_path / "whole"))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.is_file()}
    dst, kept_something, write = tmp_path / "out", 0, 0
    while True:
        write += 5
        _killed_at(write, plan_dcp(hf, dst))
        if dst.exists():
            break
        kept = run(plan_dcp(hf, dst))
        kept_something += kept > 0
        found = {path.name: path.read_bytes() for path in dst.iterdir() if path.is_file()}
        assert found == expected
        assert not (tmp_path / "out.partial").exists()
        shutil.rmtree(dst)
    assert write > 20
    assert kept_something > 2


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_was_changed_meanwhile_is_written_again(hf: Path, tmp_path: Path) -> None:
    plan = plan_dcp(hf, tmp_path / "out")
    plan.begin()
    for file in plan.files[:2]:
        plan.write(file)
    first = tmp_path / "out.partial" / plan.files[0].name
    first.write_bytes(first.read_bytes()[:-1] + b"!")
    kept = plan_dcp(hf, tmp_path / "out").begin()
    assert list(kept) == [plan.files[1].name]
    run(plan_dcp(hf, tmp_path / "out"))
    open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("change", ["options", "source"])
def test_another_plan_says_so_and_starts_anew_only_if_asked(hf: Path, tmp_path: Path, change: str) -> None:
    plan = plan_dcp(hf, tmp_path / "out")
    plan.begin()
    plan.write(plan.files[0])
    options = {"dtype": torch.bfloat16} if change == "options" else {}
    if change == "source":
        save_file(tensors(), hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"out\.partial has the remains of another conversion.*--restart"):
        run(plan_dcp(hf, tmp_path / "out", **options))
    assert run(plan_dcp(hf, tmp_path / "out", **options), restart=True) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def test_what_is_in_the_way_is_not_touched(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"out\.partial is in the way"):
        run(plan_dcp(hf, tmp_path / "out"))
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointError, match=r"exists and is not a checkpoint with a manifest\.json"):
        run(plan_dcp(hf, tmp_path / "photos"), overwrite=True)
    with pytest.raises(CheckpointError, match=r"the folder .*absent does not exist; make it first"):
        run(plan_dcp(hf, tmp_path / "absent" / "out"))
    run(plan_dcp(hf, tmp_path / "step-0"))
    with pytest.raises(CheckpointError, match=r"exists\. Give another name, or replace it with --overwrite"):
        run(plan_dcp(hf, tmp_path / "step-0"))
    run(plan_dcp(hf, tmp_path / "step-0"), overwrite=True)
    out = to_hugging_face(from_dcp(tmp_path / "step-0", None, FACTS), hf, keys=HF, files={})
    with pytest.raises(CheckpointError, match="is not a result of titan-convert"):  # nobody's download is replaced
        run(out, overwrite=True)


@pytest.mark.parametrize("name", ["manifest.json", "titan-convert.json"])
def test_a_folder_is_ours_only_if_its_list_of_files_is_and_has_them_all(hf: Path, tmp_path: Path, name: str) -> None:
    dst = tmp_path / "out"

    def plan() -> Plan:
        return (
            plan_dcp(hf, dst)
            if name == "manifest.json"
            else to_hugging_face(from_hugging_face(hf, HF, FACTS), dst, keys=HF, files={})
        )

    for content in ("{}", "[1]", "no JSON", '{"format": "titan-convert"}', '{"name": "an extension of a browser"}'):
        dst.mkdir()
        (dst / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"{name} that can be read"):
            run(plan(), overwrite=True)
        assert (dst / name).read_text() == content
        shutil.rmtree(dst)
    run(plan())
    (dst / "sub").mkdir()
    (dst / "sub" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=f"files that its {name} doesn't list: sub/thesis.tex"):
        run(plan(), overwrite=True)
    assert (dst / "sub" / "thesis.tex").exists()
    shutil.rmtree(dst / "sub")
    run(plan(), overwrite=True)


def test_a_damaged_source_leaves_nothing(hf: Path, tmp_path: Path) -> None:
    run(plan_dcp(hf, tmp_path / "step-0"))
    data = tmp_path / "step-0" / "__0_0.distcp"
    data.write_bytes(b"x" * data.stat().st_size)
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp: a tensor cannot be read"):
        run(to_hugging_face(from_dcp(tmp_path / "step-0", None, FACTS), tmp_path / "out", keys=HF, files={}))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "step-0"}


def test_ranks_may_share_the_files(hf: Path, tmp_path: Path) -> None:
    native = from_hugging_face(hf, HF, FACTS)
    ranks = [to_hugging_face(native, tmp_path / "out", keys=HF, files={}, shard_bytes=200) for _ in range(2)]
    assert len(ranks[0].files) > 2
    ranks[0].begin()
    written = {file.name: ranks[i % 2].write(file) for i, file in enumerate(ranks[0].files)}
    ranks[0].finish(written)
    assert same(tmp_path / "out", tensors())
    assert not (tmp_path / "out" / FOLDER).exists()


# ---- object stores


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest) -> Callable[[str], str]:
    root = request.getfixturevalue(request.param)
    return lambda name: f"{root}/{name}"


@pytest.mark.usefixtures("small_pieces")
def test_to_a_bucket_within_it_and_back(hf: Path, tmp_path: Path, bucket: Callable[[str], str]) -> None:
    plan = plan_dcp(hf, bucket("step-0"))
    plan.begin()
    plan.write(plan.files[0])
    assert "manifest.json" not in place_of(bucket("step-0")).files()
    assert run(plan_dcp(hf, bucket("step-0"))) > 0  # goes on
    assert not [name for name in place_of(bucket("step-0")).files() if name.startswith(FOLDER)]
    open_checkpoint(bucket("step-0"))
    with pytest.raises(CheckpointError, match=r"exists\. Give another name"):
        run(plan_dcp(hf, bucket("step-0")))
    run(to_meta(from_dcp(bucket("step-0"), None, FACTS), bucket("meta"), keys=META, files={}, shards=2))
    run(to_hugging_face(from_meta(bucket("meta"), META, FACTS), bucket("hf"), keys=HF, files={}))
    run(to_dcp(from_hugging_face(bucket("hf"), HF, FACTS), tmp_path / "back"))
    run(to_hugging_face(from_dcp(tmp_path / "back", None, FACTS), tmp_path / "out", keys=HF, files={}))
    assert same(tmp_path / "out", tensors())
