"""Finding a source, its options, subsets, normalisation, and fitting a model that is already there."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eff.data import Data, load_data, ordered_batches, shuffled_batches
from eff.data import stores as stores_module
from eff.data.stores import ArrayStore, EncodedStore
from eff.data.subsets import choose
from eff.errors import DataError, MissingDependencyError, Problems
from eff.schemas import DataSpec, TaskSpec

pytest.importorskip("sklearn", reason="the digits come from scikit-learn (eff-core[digits])")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def save_arrays(path, images, labels, **more):
    np.savez(path, images=images, labels=labels, **more)
    return path


# --- the source


def test_digits_are_1078_for_training_and_719_for_testing(digits):
    assert (len(digits.train), len(digits.test)) == (1078, 719)
    assert digits.task.options["classes"] == [str(digit) for digit in range(10)]
    assert digits.task.options["input_shape"] == [1, 8, 8]


def test_digits_lie_between_0_and_1_and_are_whole_sixteenths(digits):
    batch = digits.test.batch([0, 5, 7])
    assert batch["image"].shape == (3, 1, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert torch.equal((batch["image"] * 16).round() / 16, batch["image"])
    assert batch["image"].min() == 0 and batch["image"].max() == 1


def test_both_splits_of_the_digits_have_the_classes_in_the_same_proportions(digits):
    train, test = (torch.bincount(part.labels).double() / len(part) for part in (digits.train, digits.test))
    assert (train - test).abs().max() < 1 / 719 + 1 / 1078  # one sample of rounding in each


def test_an_unknown_source_gets_a_suggestion_and_the_list():
    with pytest.raises(DataError) as error:
        load_data("digit")
    assert str(error.value) == (
        "data 'digit': there is no source, file or folder 'digit'; did you mean 'digits'; sources are corpus, csv, digits, folder, "
        "hf, npz, parquet and package.module:function"
    )


def test_a_source_that_needs_a_path_says_so():
    with pytest.raises(DataError, match=r"data 'folder': nothing named; write folder:PATH"):
        load_data("folder")


def test_an_extension_adds_a_source(digits, monkeypatch):
    module = types.ModuleType("some_extension")
    module.load = lambda spec, task: Data(spec=spec, task=digits.task, test=digits.test)
    monkeypatch.setitem(sys.modules, "some_extension", module)
    assert len(load_data("mine:x", sources={"mine": "some_extension:load"}).test) == 719
    with pytest.raises(DataError, match="data 'mein:x': .*did you mean 'mine'"):
        load_data("mein:x", sources={"mine": "some_extension:load"})


def test_an_extension_cannot_take_a_built_in_name():
    with pytest.raises(DataError, match="'digits' is built in, and other:load takes the same name"):
        load_data("digits", sources={"digits": "other:load"})


def test_a_module_and_function_are_a_source(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "from eff.data import load_data\n"
        "def small(spec, task):\n    return load_data('digits?train=20&test=' + spec.options['test'], task)\n"
        "def wrong(spec, task):\n    return 3\n"
        "def broken(spec, task):\n    raise KeyError('no such row')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert len(load_data("own_data:small?test=30").test) == 30
    with pytest.raises(DataError, match="the function returned int; it must return eff.data.Data"):
        load_data("own_data:wrong")
    with pytest.raises(DataError, match="data 'own_data:broken' failed: KeyError: 'no such row'"):
        load_data("own_data:broken")
    with pytest.raises(DataError, match="module own_data has no function 'smal'"):
        load_data("own_data:smal")


def test_a_missing_scikit_learn_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'eff-core\[digits\]'"):
        load_data("digits")


# --- the options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digits?train=abc", "data 'digits?train=abc': train must be a whole number of samples, 0 or more, got 'abc'"),
        ("digits?test=-1", "data 'digits?test=-1': test must be a whole number of samples, 0 or more, got '-1'"),
        ("digits?size=0", "data 'digits?size=0': size must be N or HxW in pixels, each from 1 to 8192, got '0'"),
        ("digits?size=9x", "data 'digits?size=9x': size must be N or HxW in pixels, each from 1 to 8192, got '9x'"),
        (
            "digits?trian=5",
            "data 'digits?trian=5': option 'trian' is unknown; did you mean 'train'?; "
            "digits knows train, test, seed, size",
        ),
        ("digits?train=0&test=0", "data 'digits?train=0&test=0': train=0 and test=0 leave nothing"),
        (
            "digits?train=1500&test=500",
            "data 'digits?train=1500&test=500': there are 1797 images in all; train=1500 and test=500 ask for 2000",
        ),
        (
            "digits?test=1798",
            "data 'digits?test=1798': there are 1797 images in all; train=0 and test=1798 ask for 1798",
        ),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(text, message):
    with pytest.raises(DataError) as error:
        load_data(text)
    assert str(error.value) == message


def test_all_wrong_options_and_the_missing_path_are_reported_at_once():
    with pytest.raises(Problems) as error:
        load_data("folder:nowhere?train=x&sede=1")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "there is no file or folder nowhere" in lines[0]
    assert any("train must be" in line for line in lines)
    assert any("did you mean 'seed'?" in line for line in lines)


def test_asking_for_more_than_a_split_has_says_how_many_there_are(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"x_train": np.zeros((6, 4, 4), np.uint8), "y_train": np.arange(6) % 2}
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="train=7 asks for more than the 6 train images there are"):
        load_data(f"npz:{path}?train=7")
    with pytest.raises(DataError, match="test=1 asks for more than the 0 test images there are"):
        load_data(f"npz:{path}?test=1")


def test_sizes_and_seed_choose_the_samples():
    first, again, other = (load_data(f"digits?train=50&test=20&seed={seed}") for seed in (1, 1, 2))
    assert (len(first.train), len(first.test)) == (50, 20)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_train_and_test_of_undivided_data_are_disjoint_and_complete(tmp_path):
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1)
    data = load_data(f"npz:{save_arrays(tmp_path / 'a.npz', images, np.arange(100) % 4)}?train=30")
    values = [
        (part.batch(range(len(part)))["image"] * 255).round().flatten().tolist() for part in (data.train, data.test)
    ]
    assert sorted(values[0] + values[1]) == list(range(100))
    assert len(values[0]) == 30


def test_size_resizes_what_is_in_memory():
    data = load_data("digits?size=16x12&train=0&test=5")
    assert data.test.batch([0])["image"].shape == (1, 1, 16, 12)
    assert data.train is None


# --- stratified choice


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_every_class_gives_its_share_up_to_one_sample(values, data):
    labels = torch.tensor(values)
    samples = data.draw(st.integers(0, len(values)))
    chosen, rest = choose(labels, samples, torch.Generator().manual_seed(0))
    assert len(chosen) == samples
    assert sorted(chosen.tolist() + rest.tolist()) == list(range(len(values)))
    share = torch.bincount(labels, minlength=6) * samples / len(values)
    assert (torch.bincount(labels[chosen], minlength=6) - share).abs().max() < 1


def test_classes_of_one_image_are_chosen_at_random():
    labels = torch.arange(1000)
    first, _ = choose(labels, 256, torch.Generator().manual_seed(0))
    other, _ = choose(labels, 256, torch.Generator().manual_seed(1))
    assert len(first) == 256
    assert first.float().mean() == pytest.approx(499.5, abs=60)  # standard error of the mean: 16
    assert len(set(first.tolist()) & set(other.tolist())) < 120  # expected: 66


# --- normalisation and shape


def test_mean_and_deviation_are_those_of_the_training_images(digits):
    images = digits.train.batch(range(len(digits.train)))["image"].double()
    assert digits.task.options["mean"] == [pytest.approx(images.mean().item(), abs=1e-6)]
    assert digits.task.options["std"] == [pytest.approx(images.std(correction=0).item(), abs=1e-6)]


def test_a_constant_channel_has_a_deviation_above_0(tmp_path):
    path = save_arrays(tmp_path / "a.npz", np.full((10, 4, 4), 9, np.uint8), np.arange(10) % 2)
    assert load_data(f"npz:{path}").task.options["std"] == [pytest.approx(1 / 255, abs=1e-6)]


def test_without_training_images_there_is_no_normalisation():
    assert load_data("digits?train=0").task.options["mean"] == []


def test_a_model_decides_shape_and_normalisation():
    task = TaskSpec(options={"input_shape": [3, 12, 12], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]})
    data = load_data("digits?train=10&test=10", task)
    assert data.train.batch([0])["image"].shape == (1, 3, 12, 12)
    assert data.task.options["mean"] == [0.1, 0.2, 0.3]
    assert data.task.options["std"] == [1.0, 1.0, 2.0]


def test_a_size_that_the_model_does_not_take_is_refused():
    task = TaskSpec(options={"input_shape": [1, 8, 8]})
    with pytest.raises(DataError, match="the model takes 8x8 images, size says 16x16; leave size out"):
        load_data("digits?size=16", task)


def test_another_task_than_classification_is_refused():
    with pytest.raises(DataError, match="the model's task is restoration, not classification"):
        load_data("digits", TaskSpec(name="restoration"))


def test_data_that_fits_a_model_by_its_shape_alone_says_so(tmp_path):
    images, labels = np.zeros((4, 2, 2, 3), np.uint8), np.array([1, 0, 1, 0])
    path = save_arrays(tmp_path / "a.npz", images, labels, classes=np.array(["dog", "cat"]))
    grey = TaskSpec(options={"classes": ["0", "1"], "input_shape": [1, 2, 2]})
    assert load_data(f"npz:{path}?train=0", grey).notes == (
        "none of its classes (dog, cat) is one of the model's (0, 1); they are taken for the model's outputs in this order",
        "its colour images are made grey for the model",
    )
    assert load_data(f"npz:{path}?train=0", TaskSpec(options={"classes": ["cat", "dog"]})).notes == ()


def test_classes_that_the_model_knows_get_its_indices(tmp_path):
    labels = np.array([0, 1, 0, 1])
    path = save_arrays(tmp_path / "a.npz", np.zeros((4, 2, 2), np.uint8), labels, classes=np.array(["dog", "cat"]))
    data = load_data(f"npz:{path}?train=0", TaskSpec(options={"classes": ["bird", "cat", "dog"]}))
    assert data.test.batch(range(4))["label"].tolist() == [2, 1, 2, 1]
    assert data.task.options["classes"] == ["bird", "cat", "dog"]


def test_a_class_that_the_model_does_not_know_is_named(tmp_path):
    images, labels = np.zeros((4, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    path = save_arrays(tmp_path / "a.npz", images, labels, classes=np.array(["cat", "cow"]))
    with pytest.raises(DataError, match="has class 'cow', which the model does not know; it knows bird, cat, dog"):
        load_data(f"npz:{path}", TaskSpec(options={"classes": ["bird", "cat", "dog"]}))


# --- batches and fingerprints


def test_batches_in_order_cover_every_sample_once(digits):
    labels = torch.cat([batch["label"] for batch in ordered_batches(digits.test, 100)])
    assert torch.equal(labels, digits.test.labels)


def test_shuffled_batches_have_every_sample_once(digits):
    batches = shuffled_batches(digits.test, 100, torch.Generator().manual_seed(0))
    labels = torch.cat([batch["label"] for batch in batches])
    assert not torch.equal(labels, digits.test.labels)
    assert torch.equal(labels.sort().values, digits.test.labels.sort().values)


def test_the_fingerprint_of_the_digits_is_the_same_on_every_machine():
    data = load_data("digits?train=0&test=1797")
    assert data.test.fingerprint() == "fa44c5d6f38d8dc0"


def test_the_fingerprint_changes_with_one_pixel_one_label_and_the_shape(tmp_path):
    images, labels = np.zeros((5, 4, 4), np.uint8), np.array([0, 1, 0, 1, 0])
    other_images, other_labels = images.copy(), labels.copy()
    other_images[3, 2, 2], other_labels[4] = 1, 1
    paths = [
        save_arrays(tmp_path / "a.npz", images, labels),
        save_arrays(tmp_path / "b.npz", other_images, labels),
        save_arrays(tmp_path / "c.npz", images, other_labels),
    ]
    prints = [load_data(f"npz:{path}?train=0").fingerprint() for path in paths]
    prints.append(load_data(f"npz:{paths[0]}?train=0&size=8").fingerprint())
    assert len(set(prints)) == 4


# --- decoding


def make_files(folder, count=6, side=4):
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(np.full((side, side, 3), index * 10, np.uint8)).save(path)
    return paths


def test_images_are_decoded_once_and_kept(tmp_path, monkeypatch):
    paths = make_files(tmp_path)
    calls = []
    decode = stores_module.decode
    monkeypatch.setattr(stores_module, "decode", lambda *given: calls.append(given[2]) or decode(*given))
    store = EncodedStore(paths, lambda index: paths[index].name)
    first = store.pixels([3, 1, 3], (3, 4, 4))
    assert first[:, 0, 0, 0].tolist() == [30, 10, 30]
    store.pixels(range(6), (3, 4, 4))
    assert sorted(calls) == ["0.png", "1.png", "2.png", "3.png", "3.png", "4.png", "5.png"]
    assert store.take([5, 0]).pixels([0, 1], (3, 4, 4))[:, 0, 0, 0].tolist() == [50, 0]


def test_no_more_than_the_bound_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(stores_module, "CACHE_BYTES", 2 * 3 * 4 * 4)  # two images
    paths = make_files(tmp_path)
    store = EncodedStore(paths, lambda index: paths[index].name)
    for _ in range(2):
        assert store.pixels(range(6), (3, 4, 4))[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert int(store._cache._filled.sum()) == 2


def test_changing_a_batch_does_not_change_the_data(digits):
    before = digits.test.batch([0])["image"].clone()
    digits.test.batch([0])["image"].fill_(0.5)
    assert torch.equal(digits.test.batch([0])["image"], before)


def test_grey_and_rgb_arrays_turn_into_each_other():
    grey = ArrayStore(torch.full((1, 1, 2, 2), 100, dtype=torch.uint8)).pixels([0], (3, 2, 2))
    assert grey.shape == (1, 3, 2, 2) and grey.unique().tolist() == [pytest.approx(100 / 255)]
    red = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    red[:, 0] = 255
    assert ArrayStore(red).pixels([0], (1, 2, 2)).unique().tolist() == [pytest.approx(0.299)]


def test_a_spec_may_be_given_instead_of_text():
    assert len(load_data(DataSpec(scheme="digits", options={"train": "7"})).train) == 7
