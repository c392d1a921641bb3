"""Model files: what is refused, with which words, and that nothing in them runs."""

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from eff.checkpoint import load_state, read_model_file
from eff.errors import EffError, ModelError, OutputError, RunError
from eff.files import atomic_path, check_output_folder, check_space, write_text
from eff.runner import apply
from eff.schemas import Recipe
from eff.testing.samples import DATA, MODEL, tiny_cnn


@pytest.fixture
def checkpoint(recipe, tmp_path):
    apply(recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 0})}), tmp_path / "run")
    return tmp_path / "run" / "model.pt"


def test_a_checkpoint_is_a_plain_dictionary(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["eff"]["model"]["source"] == MODEL
    assert content["eff"]["task"]["options"]["mean"] == [0.3]
    assert set(content["state_dict"]) == set(tiny_cnn().state_dict())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"gone\.pt: there is no such file"):
        read_model_file(tmp_path / "gone.pt")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(ModelError, match="the file is empty"):
        read_model_file(tmp_path / "model.pt")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(checkpoint, keep):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_model_file(checkpoint)


@pytest.mark.parametrize("content", [b"hello", b"\x00\x01\x02\x03" * 100])
def test_what_is_neither_archive_nor_pickle_is_no_model_file_and_no_matter_of_trust(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.pt: is no model file") as caught:
        read_model_file(tmp_path / "model.pt")
    assert "trust" not in str(caught.value)


def test_an_onnx_file_is_named_for_what_it_is(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(ModelError, match="ONNX is for onnxruntime; name the model.pt"):
        read_model_file(tmp_path / "model.onnx")


def test_another_architecture_than_the_file_names_is_refused(checkpoint, tmp_path):
    recipe = Recipe(model=str(checkpoint), arch="zoo:digits_cnn", data=DATA, device="cpu")
    with pytest.raises(ModelError, match=f"the file says itself that it is {MODEL}; leave out --arch zoo:digits_cnn"):
        apply(recipe, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_pickled_module_is_refused_and_the_message_says_why(tmp_path):
    torch.save(tiny_cnn(), tmp_path / "model.pt")
    with pytest.raises(ModelError, match="pickled code .*TinyCNN.* could run anything when loaded.*--trust-pickle"):
        read_model_file(tmp_path / "model.pt")
    assert read_model_file(tmp_path / "model.pt", trust_pickle=True).module is not None


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path, legacy):
    victim = tmp_path / "it-ran"
    torch.save({"state_dict": Attack(str(victim))}, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="was not loaded"):
        read_model_file(tmp_path / "model.pt")
    assert not victim.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(str(victim))))
    with pytest.raises(ModelError):
        read_model_file(tmp_path / "plain.pt")
    assert not victim.exists()


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"\0" * 50_000_000)
    with pytest.raises(ModelError, match="would unpack to 50,000,000"):
        read_model_file(path)


def test_an_exported_program_needs_trust(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"x")
    with pytest.raises(ModelError, match="can hold pickled objects"):
        read_model_file(tmp_path / "model.pt2")


def test_a_state_dict_that_does_not_fit_says_which_keys(tmp_path):
    state = tiny_cnn(num_classes=5).state_dict()
    state["extra"] = state.pop("conv2.bias")
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ModelError) as caught:
        apply(Recipe(model=str(tmp_path / "weights.pt"), arch=MODEL, data=DATA), tmp_path / "out")
    for words in (
        "missing: 'conv2.bias'",
        "not in the model: 'extra'",
        "'fc.weight' is (5, 8) in the file and (4, 8) in the model",
    ):
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bare_state_dict_needs_an_architecture(tmp_path):
    torch.save(tiny_cnn().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="holds weights without an architecture; add --arch"):
        apply(Recipe(model=str(tmp_path / "weights.pt"), data=DATA), tmp_path / "out")


def test_wrapped_and_prefixed_weights_load(tmp_path):
    state = {f"module.{key}": value for key, value in tiny_cnn().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "weights.th")
    assert set(read_model_file(tmp_path / "weights.th").state) == set(tiny_cnn().state_dict())


def test_a_missing_plugin_is_named_with_its_install_command(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["eff"]["methods"] = [
        {"name": "quant_gone", "version": "1.0", "distribution": "acme-quant-gone", "config": {}, "structure": {}}
    ]
    torch.save(content, checkpoint)
    with pytest.raises(EffError, match=r"the model was changed by quant_gone 1\.0: .*pip install acme-quant-gone"):
        apply(Recipe(model=str(checkpoint)), checkpoint.parent / "out")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RunError, match="cannot write .*No space left"), atomic_path(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"


def test_too_little_space_is_seen_before_the_run(tmp_path):
    with pytest.raises(OutputError, match="MB free, the run needs"):
        check_space(tmp_path, 1 << 62)


def test_an_output_that_exists_needs_force(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(OutputError, match="exists and is not empty; add --force"):
        check_output_folder(tmp_path, force=False)
    check_output_folder(tmp_path, force=True)


def test_a_file_as_output_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="is a file"):
            check_output_folder(out, force=False)


def test_no_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="no permission to write"):
        check_output_folder(tmp_path / "out", force=False)


def test_a_model_may_know_other_names_of_its_weights():
    class Renamed(nn.Linear):
        @staticmethod
        def own_name(key):
            return key.removeprefix("fc.")

    model, state = Renamed(2, 2), nn.Linear(2, 2).state_dict()
    load_state(model, {f"fc.{key}": value for key, value in state.items()}, "file", "model")
    assert torch.equal(model.weight, state["weight"])
