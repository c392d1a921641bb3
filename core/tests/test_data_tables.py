"""Sources `parquet:`, `hf:` and `npz:`."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eff.data import load_data, ordered_batches
from eff.errors import DataError, MissingDependencyError

CIFAR = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10"


def png(value: int, side: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


# --- parquet


@pytest.fixture
def pq():
    return pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (eff-core[hub])")


def write_parquet(path: Path, labels, names=None, images=None, label_column: str = "label") -> Path:
    """Write a file in the schema of Hugging Face datasets; the red value is ten times the row."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    images = images or [png(10 * row) for row in range(len(labels))]
    table = pa.table({"image": [{"bytes": image, "path": None} for image in images], label_column: labels})
    if names:
        features = {"image": {"_type": "Image"}, label_column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def test_train_and_test_files_are_the_splits_and_the_metadata_names_the_classes(tmp_path, pq):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [1], ["cat", "dog"])
    write_parquet(tmp_path / "data" / "validation.parquet", [1, 0], ["cat", "dog"])
    data = load_data(f"parquet:{tmp_path}")
    assert (len(data.train), len(data.test)) == (3, 2)
    assert data.task.options["classes"] == ["cat", "dog"]
    batch = data.train.batch(range(3))
    assert batch["label"].tolist() == [0, 1, 1]
    assert (batch["image"][:, 0, 0, 0] * 255).round().tolist() == [0, 10, 0]


def test_a_file_is_split_80_to_20_and_a_test_file_is_all_test(tmp_path, pq):
    data = load_data(str(write_parquet(tmp_path / "own.parquet", [0, 1] * 5)))
    assert (len(data.train), len(data.test)) == (8, 2)
    data = load_data(str(write_parquet(tmp_path / "test.parquet", [0, 1] * 5)))
    assert data.train is None and len(data.test) == 10
    assert len(load_data(f"parquet:{tmp_path / 'test.parquet'}?train=4").test) == 6
    assert load_data(f"parquet:{tmp_path / 'test.parquet'}?test=4").train is None


def test_labels_may_be_names(tmp_path, pq):
    data = load_data(f"parquet:{write_parquet(tmp_path / 'own.parquet', ['b', 'a', 'b', 'c'])}?train=0")
    assert data.task.options["classes"] == ["a", "b", "c"]
    assert data.test.batch(range(4))["label"].tolist() == [1, 0, 1, 2]


def test_options_name_the_columns(tmp_path, pq):
    path = write_parquet(tmp_path / "own.parquet", [0, 1, 0, 1], label_column="kind")
    assert len(load_data(f"parquet:{path}?label=kind&train=0").test) == 4
    with pytest.raises(DataError, match=r"has no label column .*; columns are image, kind; name it with \?label=NAME"):
        load_data(f"parquet:{path}")
    with pytest.raises(DataError, match="column 'knd' cannot be the label column; columns are image, kind"):
        load_data(f"parquet:{path}?label=knd")


def test_a_table_without_images_is_refused(tmp_path, pq):
    import pyarrow as pa

    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet: has no image column that eff recognises; columns are text, label"
    ):
        load_data(f"parquet:{tmp_path / 'a.parquet'}")


def test_labels_that_are_no_classes_are_refused(tmp_path, pq):
    with pytest.raises(DataError, match="column 'label' is of type double; labels are whole numbers or names"):
        load_data(f"parquet:{write_parquet(tmp_path / 'a.parquet', [0.5, 1.0])}")
    with pytest.raises(DataError, match="label 7 is out of range; there are 2 classes, from 0"):
        load_data(f"parquet:{write_parquet(tmp_path / 'a.parquet', [0, 7], ['cat', 'dog'])}")
    with pytest.raises(DataError, match="label -1 is out of range"):
        load_data(f"parquet:{write_parquet(tmp_path / 'a.parquet', [0, -1])}")


def test_a_missing_value_names_its_row(tmp_path, pq):
    with pytest.raises(DataError, match=r"a\.parquet, row 1: column 'image' has no image bytes"):
        load_data(f"parquet:{write_parquet(tmp_path / 'a.parquet', [0, 1], images=[png(0), None])}")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: column 'label' has no label"):
        load_data(f"parquet:{write_parquet(tmp_path / 'a.parquet', [0, None])}")


def test_a_damaged_picture_names_its_row(tmp_path, pq):
    path = write_parquet(tmp_path / "a.parquet", [0, 1], images=[png(0), b"nonsense"])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: is not an image"):
        load_data(f"parquet:{path}?train=0")


def test_a_file_that_is_no_parquet_is_named(tmp_path, pq):
    (tmp_path / "a.parquet").write_text("nonsense")
    with pytest.raises(DataError, match=r"a\.parquet: is not a Parquet file that pyarrow can read"):
        load_data(f"parquet:{tmp_path / 'a.parquet'}")


def test_a_folder_without_parquet_files_is_named(tmp_path, pq):
    with pytest.raises(DataError, match=r"has no \*\.parquet files, neither there nor in data/"):
        load_data(f"parquet:{tmp_path}")


def test_a_missing_pyarrow_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"needs pyarrow, .*; pip install 'eff-core\[hub\]'"):
        load_data(f"parquet:{tmp_path}")


@pytest.mark.skipif(not (CIFAR / "test.parquet").is_file(), reason="needs ../shared/data/cifar10/test.parquet")
def test_a_subset_of_cifar10_has_as_many_images_of_each_class(pq):
    data = load_data(f"parquet:{CIFAR / 'test.parquet'}?test=500")
    labels = torch.cat([batch["label"] for batch in ordered_batches(data.test, 200)])
    assert data.task.options["input_shape"] == [3, 32, 32]
    assert data.task.options["classes"][:3] == ["airplane", "automobile", "bird"]
    assert torch.bincount(labels).tolist() == [50] * 10


# --- hf


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets", reason="needs datasets (eff-core[hub])")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    module.disable_progress_bars()
    return module


def make_dataset(datasets, labels):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": [{"bytes": png(10 * row), "path": None} for row in range(len(labels))], "kind": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_dataset_is_read_by_its_feature_types(tmp_path, datasets):
    splits = {"train": make_dataset(datasets, [0, 1, 1]), "validation": make_dataset(datasets, [1, 0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load_data(f"hf:{tmp_path / 'saved'}?train=2")
    assert (len(data.train), len(data.test)) == (2, 2)
    assert data.task.options["classes"] == ["cat", "dog"]
    batch = data.test.batch([1, 0])
    assert batch["label"].tolist() == [0, 1]
    assert (batch["image"][:, 0, 0, 0] * 255).round().tolist() == [10, 0]


def test_options_name_split_and_column(tmp_path, datasets):
    splits = {"a": make_dataset(datasets, [0, 1]), "b": make_dataset(datasets, [1, 0, 1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load_data(f"hf:{tmp_path / 'saved'}?train_split=b&test_split=a")
    assert (len(data.train), len(data.test)) == (3, 2)
    with pytest.raises(DataError, match="has the splits a, b; name two"):
        load_data(f"hf:{tmp_path / 'saved'}")
    with pytest.raises(DataError, match="has no split 'c'; it has a, b"):
        load_data(f"hf:{tmp_path / 'saved'}?train_split=c")
    with pytest.raises(DataError, match="has no column 'kid'; did you mean 'kind'"):
        load_data(f"hf:{tmp_path / 'saved'}?train_split=a&label=kid")


def test_a_dataset_without_splits_is_split_80_to_20(tmp_path, datasets):
    make_dataset(datasets, [0, 1] * 5).save_to_disk(tmp_path / "saved")
    data = load_data(f"hf:{tmp_path / 'saved'}")
    assert (len(data.train), len(data.test)) == (8, 2)


def test_a_folder_of_images_is_loaded_by_the_library(tmp_path, datasets):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(png(10))
    data = load_data(f"hf:{tmp_path / 'pets'}")
    assert data.task.options["classes"] == ["cat", "dog"]
    assert data.train.batch([0, 1])["image"].shape == (2, 3, 4, 4)


def test_a_dataset_that_is_not_there_is_named(tmp_path, datasets):
    with pytest.raises(DataError, match=r"data 'hf:.*nowhere' cannot be loaded: \w+: .*; check the id"):
        load_data(f"hf:{tmp_path / 'nowhere'}")


def test_a_missing_datasets_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"needs datasets, .*; pip install 'eff-core\[hub\]'"):
        load_data("hf:cifar10")


# --- npz

IMAGES = np.arange(4 * 2 * 5, dtype=np.uint8).reshape(4, 2, 5)
LABELS = np.array([0, 1, 2, 1])


def save(path: Path, **arrays) -> str:
    np.savez(path / "a.npz", **arrays)
    return f"npz:{path / 'a.npz'}"


def all_images(text: str) -> torch.Tensor:
    data = load_data(text + ("&" if "?" in text else "?") + "train=0")
    return data.test.batch(range(len(data.test)))["image"]


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
def test_arrays_with_splits_are_recognised(tmp_path, names):
    data = load_data(save(tmp_path, **dict(zip(names, (IMAGES, LABELS[:, None], IMAGES[:2], LABELS[:2]), strict=True))))
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.task.options["classes"] == ["0", "1", "2"]


def test_grey_nchw_and_nhwc_arrays_give_the_same_pixels(tmp_path):
    rgb = np.stack([IMAGES, IMAGES + 50, IMAGES + 100], axis=1)
    expected = torch.from_numpy(rgb).float() / 255
    assert torch.equal(all_images(save(tmp_path, images=rgb, labels=LABELS)), expected)
    assert torch.equal(all_images(save(tmp_path, images=rgb.transpose(0, 2, 3, 1), labels=LABELS)), expected)
    assert torch.equal(all_images(save(tmp_path, images=IMAGES, labels=LABELS)), expected[:, :1])


def test_floats_keep_their_values(tmp_path):
    images = np.random.default_rng(0).random((4, 3, 3))
    assert torch.equal(all_images(save(tmp_path, images=images, labels=LABELS))[:, 0], torch.from_numpy(images).float())


def test_an_ambiguous_layout_is_asked_for(tmp_path):
    images = np.zeros((4, 3, 5, 3), np.uint8)
    text = save(tmp_path, images=images, labels=LABELS)
    with pytest.raises(DataError, match=r"shape \(4, 3, 5, 3\), which may be NCHW or NHWC; add \?layout=nchw"):
        load_data(text)
    assert all_images(f"{text}?layout=nchw").shape == (4, 3, 5, 3)
    assert all_images(f"{text}?layout=nhwc").shape == (4, 3, 3, 5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has no images and labels; .* found no arrays"),
        ({"pictures": IMAGES}, "name the arrays x_train, .*; found pictures"),
        ({"x_train": IMAGES}, "array 'x_train' has no labels; add 'y_train'"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "4 images in 'images', but 3 labels in 'labels'"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "array 'images' is empty"),
        ({"images": IMAGES / np.nan, "labels": LABELS}, "array 'images' has NaN or infinite values, first in image 0"),
        ({"images": IMAGES * 1.0, "labels": LABELS}, r"values from 0 to 39; floats must be in \[0, 1\]"),
        ({"images": IMAGES.astype(int) * 9, "labels": LABELS}, "values from 0 to 351; whole numbers must be 0 to 255"),
        ({"images": IMAGES > 3, "labels": LABELS}, "array 'images' is of type bool"),
        ({"images": IMAGES[:, 0], "labels": LABELS}, r"has shape \(4, 5\); images are \(N, H, W\)"),
        ({"images": IMAGES[:, None].repeat(2, 1), "labels": LABELS}, r"has shape \(4, 2, 2, 5\); images are"),
        ({"images": IMAGES, "labels": LABELS + 0.5}, "array 'labels' has shape .* labels are whole numbers"),
        ({"images": IMAGES, "labels": np.eye(4)}, r"array 'labels' has shape \(4, 4\)"),
        ({"images": IMAGES, "labels": LABELS - 1}, "label -1 is out of range"),
        ({"images": IMAGES, "labels": LABELS, "classes": np.array(["a", "b"])}, "label 2 is out of range; there are 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
def test_what_is_wrong_with_arrays_is_named(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        load_data(save(tmp_path, **arrays))


class Harmful:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    mark = tmp_path / "executed"
    objects = np.array([Harmful(mark)] * 4, dtype=object)
    with pytest.raises(DataError, match="array 'labels' holds pickled Python objects .*; eff loads no pickles"):
        load_data(save(tmp_path, images=IMAGES, labels=objects))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Harmful(mark)))
    with pytest.raises(DataError, match=r"b\.npz: is not an \.npz file that numpy can read"):
        load_data(f"npz:{tmp_path / 'b.npz'}")
    assert not mark.exists()


def test_a_damaged_archive_is_named(tmp_path):
    save(tmp_path, images=IMAGES, labels=LABELS)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("images.npy", b"nonsense")
    for name in ("b", "c"):
        with pytest.raises(DataError, match=rf"{name}\.npz: "):
            load_data(f"npz:{tmp_path / name}.npz")
