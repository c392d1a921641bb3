"""Source `folder:PATH`: layouts, labels.csv, and what is wrong with bad folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eff.data import load_data, ordered_batches
from eff.data.augment import Augmentation
from eff.data.images import read_image
from eff.errors import DataError
from eff.schemas import TaskSpec

PHOTOS = Path(__file__).parents[2] / ".." / "shared" / "data" / "imagenet1k_samples"


def make_class(folder: Path, value: int, count: int, size: tuple[int, int] = (6, 6)) -> None:
    """Write `count` images of one colour; the position within the class is the green value."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", size, (value, index, 0)).save(folder / f"{index:02}.png")


@pytest.fixture
def pets(tmp_path) -> Path:
    """Class folders: 10 cats (red 10) and 5 dogs (red 20)."""
    make_class(tmp_path / "cat", 10, 10)
    make_class(tmp_path / "dog", 20, 5)
    return tmp_path


def write_list(folder: Path, text: str) -> Path:
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    (folder / "labels.csv").write_text(text)
    return folder


def test_class_folders_are_split_80_to_20_within_each_class(pets):
    data = load_data(f"folder:{pets}")
    assert data.task.options["classes"] == ["cat", "dog"]
    assert torch.bincount(data.train.labels).tolist() == [8, 4]
    assert torch.bincount(data.test.labels).tolist() == [2, 1]
    batch = data.train.batch(range(12))
    assert [(round(red * 255) - 10) // 10 for red in batch["image"][:, 0, 0, 0].tolist()] == batch["label"].tolist()


def test_train_and_test_folders_are_the_splits(tmp_path):
    make_class(tmp_path / "train" / "cat", 10, 3)
    make_class(tmp_path / "train" / "dog", 20, 3)
    make_class(tmp_path / "val" / "dog", 20, 2)
    data = load_data(f"folder:{tmp_path}")
    assert (len(data.train), len(data.test)) == (6, 2)
    assert data.test.batch([0, 1])["label"].tolist() == [1, 1]


def test_a_class_may_be_called_train(tmp_path):
    make_class(tmp_path / "plane", 10, 2)
    make_class(tmp_path / "train", 20, 2)
    assert load_data(f"folder:{tmp_path}").task.options["classes"] == ["plane", "train"]


def test_a_test_folder_alone_is_all_test(tmp_path):
    make_class(tmp_path / "test" / "cat", 10, 3)
    data = load_data(f"folder:{tmp_path}")
    assert data.train is None and len(data.test) == 3


def test_class_folders_count_alphabetically_as_in_other_loaders(tmp_path):
    for name in ("2", "10", "1"):
        make_class(tmp_path / name, 0, 2)
    assert load_data(f"folder:{tmp_path}").task.options["classes"] == ["1", "10", "2"]


def test_hidden_files_and_other_files_are_left_out(pets):
    (pets / ".cache").mkdir()
    (pets / "cat" / ".hidden.png").write_text("")
    (pets / "cat" / "notes.txt").write_text("")
    data = load_data(f"folder:{pets}?train=0")
    assert len(data.test) == 15


def test_images_of_different_sizes_become_224_unless_told_otherwise(pets):
    make_class(pets / "owl", 30, 2, size=(9, 7))
    assert load_data(f"folder:{pets}").task.options["input_shape"] == [3, 224, 224]
    assert load_data(f"folder:{pets}?size=8x4").task.options["input_shape"] == [3, 8, 4]


def test_colour_photos_are_flipped_and_grey_ones_are_not(pets, tmp_path):
    assert load_data(f"folder:{pets}").train.augmentation == Augmentation(shift=1, flip=True)
    for name in ("x", "y"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (32, 32)).save(tmp_path / "grey" / name / f"{index}.png")
    grey = load_data(f"folder:{tmp_path / 'grey'}")
    assert grey.task.options["input_shape"] == [1, 32, 32]
    assert grey.train.augmentation == Augmentation(shift=4)


def test_augmented_batches_are_a_function_of_the_generator(pets):
    split = load_data(f"folder:{pets}").train
    first, again, other = (split.batch(range(12), torch.Generator().manual_seed(seed))["image"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_evaluation_and_prediction_see_the_same_pixels(tmp_path):
    folder = tmp_path / "only"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg")
    data = load_data(f"folder:{tmp_path}?train=0", TaskSpec(options={"input_shape": [3, 12, 12]}))
    assert torch.equal(data.test.batch([0])["image"][0], read_image(folder / "a.jpg", (3, 12, 12)))


# --- labels.csv


def test_class_index_gives_the_output_index(tmp_path):
    text = "file,class_index,class_name\na.png,3,owl\nb.png,0,cat\nc.png,3,owl\n"
    data = load_data(f"folder:{write_list(tmp_path, text)}?train=0")
    assert data.task.options["classes"] == ["cat", "1", "2", "owl"]
    assert data.test.batch(range(3))["label"].tolist() == [3, 0, 3]


def test_class_index_is_kept_for_a_model_with_more_classes(tmp_path):
    folder = write_list(tmp_path, "file,class_index\na.png,3\nb.png,0\nc.png,1\n")
    names = [f"class {index}" for index in range(9)]
    data = load_data(f"folder:{folder}?train=0", TaskSpec(options={"classes": names}))
    assert data.task.options["classes"] == names
    assert data.test.batch(range(3))["label"].tolist() == [3, 0, 1]


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [(("dog", "cat", "dog"), ["cat", "dog"], [1, 0, 1]), (("10", "9", "9"), ["9", "10"], [1, 0, 0])],
)
def test_labels_count_alphabetically_and_numbers_by_size(tmp_path, labels, classes, indices):
    folder = write_list(tmp_path, "file,label\na.png,{}\nb.png,{}\nc.png,{}\n".format(*labels))
    data = load_data(f"folder:{folder}?train=0")
    assert data.task.options["classes"] == classes
    assert data.test.batch(range(3))["label"].tolist() == indices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x\ngone.png,y\n", r"labels\.csv, line 3: there is no file 'gone\.png' in "),
        ("file,label\ng1.png,x\ng2.png,y\n", r"no file 'g1\.png' in .* \(and 1 more\)"),
        ("name,label\na.png,x\n", r"needs a column 'file' and a column 'class_index' or 'label'; found name, label"),
        ("file,class_index\na.png,one\n", r"line 2: class_index must be a whole number of at least 0, got 'one'"),
        ("file,class_index\na.png,-1\n", r"line 2: class_index must be a whole number of at least 0, got '-1'"),
        ("file,class_index\na.png,123456789\n", r"label 123456789 is out of range; labels count the classes from 0"),
        ("file,label\n", r"labels\.csv: names no images"),
        ("", r"found none"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_data(f"folder:{write_list(tmp_path, text)}")


# --- bad folders


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no file or folder .*gone"):
        load_data(f"folder:{tmp_path / 'gone'}")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="the folder is empty; it needs one folder of images per class"):
        load_data(f"folder:{tmp_path}")


def test_images_without_classes_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has images, but no classes; .* or add labels\.csv"):
        load_data(f"folder:{tmp_path}")


def test_a_class_folder_without_images_is_named(pets):
    (pets / "owl").mkdir()
    with pytest.raises(DataError, match=r"owl: the class folder has no images .*; remove or fill it"):
        load_data(f"folder:{pets}")


def test_a_test_class_that_is_never_trained_is_named(tmp_path):
    make_class(tmp_path / "train" / "cat", 10, 2)
    make_class(tmp_path / "test" / "cow", 10, 2)
    with pytest.raises(DataError, match="class 'cow' has no images to train on"):
        load_data(f"folder:{tmp_path}")


def test_a_file_is_no_folder(pets):
    with pytest.raises(DataError, match="is a file; name the folder with the images"):
        load_data(f"folder:{pets / 'cat' / '00.png'}")


def test_a_damaged_image_is_named_when_it_is_read(pets):
    (pets / "dog" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(DataError, match=r"dog/03\.png: "):
        data = load_data(f"folder:{pets}?train=0&size=6")
        list(ordered_batches(data.test, 4))


# --- real photos


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs ../shared/data/imagenet1k_samples")
def test_one_photo_per_class_gives_a_random_training_subset_and_the_rest_for_testing():
    data = load_data(
        f"folder:{PHOTOS}?train=256&seed=0", TaskSpec(options={"input_shape": [3, 224, 224], "mean": [], "std": []})
    )
    assert (len(data.train), len(data.test)) == (256, 744)
    assert sorted(data.train.labels.tolist() + data.test.labels.tolist()) == list(range(1000))
    assert data.task.options["classes"][:2] == ["tench", "goldfish"]
    assert data.train.augmentation == Augmentation(flip=True, resized_crop=True)
    assert data.train.batch([0, 1], torch.Generator())["image"].shape == (2, 3, 224, 224)
