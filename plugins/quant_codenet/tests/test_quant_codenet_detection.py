"""The task "detection" of quant_codenet: targets, loss, decoding, average precision, scenes and photos with boxes."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eff.data import load_data
from eff.errors import DataError, UnsupportedModelError
from eff.runner import apply
from eff.schemas import Recipe, TaskSpec, TrainOptions
from eff.use import UseRequest, evaluate, predict
from eff_quant_codenet.centernet import decode, detection_loss, gaussian_radius, heatmap_loss, make_targets
from eff_quant_codenet.extension import DetectionExtension
from eff_quant_codenet.precision import average_precision, match, overlaps
from eff_quant_codenet.split import DetectionSplit, Objects, clean
from eff_quant_codenet.task import Detection, DetectionOptions

SOURCES = dict(DetectionExtension.data_sources)


def test_the_radius_is_centernets():
    # 10 x 10, overlap 0.7: b = 20, c = 100 * 0.3 / 1.7; (b + sqrt(b^2 - 4 c)) / 2 = 19.07; the enlarging case gives 2.733
    expected = (-28 + math.sqrt(28**2 + 4 * 2.8 * 30)) / 2
    assert float(gaussian_radius(torch.tensor(10.0), torch.tensor(10.0))) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(2.7332, abs=1e-4)


def targets_by_loops(boxes, labels, classes, height, width, stride):
    heat = np.zeros((len(boxes), classes, height, width))
    for image, label in zip(*np.nonzero(labels >= 0), strict=True):
        left, top, right, bottom = boxes[image, label] / stride
        x, y = int((left + right) / 2), int((top + bottom) / 2)
        w, h = math.ceil(right - left), math.ceil(bottom - top)
        roots = []
        for a, b, c in (
            (1, -(h + w), w * h * 0.3 / 1.7),
            (4, -2 * (h + w), 0.3 * w * h),
            (2.8, 1.4 * (h + w), -0.3 * w * h),
        ):
            roots.append((-b + math.sqrt(b * b - 4 * a * c)) / 2)
        radius = max(0, int(min(roots)))
        sigma = (2 * radius + 1) / 6
        for r in range(max(0, y - radius), min(height, y + radius + 1)):
            for c in range(max(0, x - radius), min(width, x + radius + 1)):
                value = math.exp(-((r - y) ** 2 + (c - x) ** 2) / (2 * sigma**2))
                place = heat[image, labels[image, label], r]
                place[c] = max(place[c], value)
    return heat


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4))
def test_heatmaps_are_the_largest_bell_of_each_class(seed, objects):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, objects, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 1 + torch.rand(2, objects, 2, generator=generator) * 33], -1)
    labels = torch.randint(-1, 3, (2, objects), generator=generator)
    targets = make_targets(boxes, labels, 3, 16, 16, 4)
    expected = targets_by_loops(boxes.double().numpy(), labels.numpy(), 3, 16, 16, 4)
    np.testing.assert_allclose(targets.heatmap.numpy(), expected, atol=1e-6)
    assert int((targets.heatmap == 1).sum()) <= int((labels >= 0).sum()) == len(targets.pixel)


def test_the_focal_loss_is_the_formula():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 3, 3), torch.rand(2, 2, 3, 3)
    target[0, 0, 1, 1] = target[1, 1, 2, 0] = 1.0
    total = 0.0
    for z, y in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        total -= (1 - p) ** 2 * math.log(p) if y == 1 else (1 - y) ** 4 * p**2 * math.log(1 - p)
    assert float(heatmap_loss(logits, target)) == pytest.approx(total / 2, rel=1e-5)


def test_size_and_centre_count_a_tenth_and_one():
    boxes, labels = torch.tensor([[[4.0, 8.0, 16.0, 24.0]]]), torch.tensor([[0]])
    targets = make_targets(boxes, labels, 1, 8, 8, 4)
    assert targets.pixel.tolist() == [4 * 8 + 2] and targets.size.tolist() == [[3, 4]]
    assert targets.centre.tolist() == [[0.5, 0.0]]
    output = torch.zeros(1, 5, 8, 8)
    base = float(heatmap_loss(output[:, :1], targets.heatmap))
    expected = base + 0.1 * (3 + 4) / 2 + 1.0 * (0.5 + 0.0) / 2
    assert float(detection_loss(output, targets)) == pytest.approx(expected)


def test_images_without_objects_have_the_negative_term_alone():
    targets = make_targets(torch.zeros(2, 1, 4), torch.full((2, 1), -1), 2, 4, 4, 4)
    output = torch.zeros(2, 6, 4, 4, requires_grad=True)
    loss = detection_loss(output, targets)
    assert loss.item() == pytest.approx(2 * 2 * 16 * 0.25 * math.log(2), rel=1e-5)
    loss.backward()
    assert bool(torch.isfinite(output.grad).all())


def test_a_certain_detector_has_a_finite_loss():
    targets = make_targets(torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[0]]), 1, 4, 4, 4)
    assert math.isfinite(float(detection_loss(torch.full((1, 5, 4, 4), 1e4), targets)))


def test_a_class_that_the_detector_does_not_have_is_refused():
    with pytest.raises(DataError, match="class 3 is out of range; the detector has 3 classes"):
        make_targets(torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[3]]), 3, 4, 4, 4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_decoding_undoes_the_targets(seed):
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(16, generator=generator)[:3]  # centres in different 4 x 4 neighbourhoods
    centre = torch.stack([cells % 4, cells // 4], 1) * 16 + 6 + 4 * torch.rand(3, 2, generator=generator)
    half = 1 + 4 * torch.rand(3, 2, generator=generator)
    boxes, labels = torch.cat([centre - half, centre + half], 1)[None], torch.randint(0, 2, (1, 3), generator=generator)
    targets = make_targets(boxes, labels, 2, 16, 16, 4)
    output = torch.zeros(1, 6, 16, 16)
    output[:, :2] = torch.logit(targets.heatmap.clamp(1e-4, 1 - 1e-4))
    rows = output[:, 2:].view(4, -1)
    rows[:2, targets.pixel], rows[2:, targets.pixel] = targets.size.T, targets.centre.T
    found = decode(output, 2, 4)
    assert int((found.scores > 0.9).sum()) == 3
    order = found.boxes[0, :3, 0].argsort()
    expected = boxes[0, :, 0].argsort()
    torch.testing.assert_close(found.boxes[0, :3][order], boxes[0][expected], atol=1e-4, rtol=0)
    assert found.labels[0, :3][order].tolist() == labels[0][expected].tolist()


def test_only_local_maxima_are_decoded():
    output = torch.full((1, 5, 4, 4), -9.0)
    output[0, 0, 1, 1:3] = torch.tensor([2.0, 1.0])
    assert int((decode(output, 1, 4).scores > 0.1).sum()) == 1


def test_the_overlap_is_shared_area_over_united():
    a, b = np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 1, 3, 3], [5, 5, 6, 6], [0, 0, 0, 0]])
    np.testing.assert_allclose(overlaps(a, b), [[1 / 7, 0, 0]])


def test_a_second_detection_of_an_object_is_wrong():
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    right = match(boxes, np.array([[0.0, 0, 10, 10]]))
    assert right[:, 0].all() and not right[:, 1:].any()


def test_average_precision_of_a_case_worked_by_hand():
    # right, wrong, right of 2 objects: precision 1 up to recall 1/2 (51 points), then 2/3 (50 points)
    scores, right = np.array([0.9, 0.8, 0.7]), np.array([[True, False, True]])
    assert average_precision(scores, right, 2)[0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision(scores, right, 4)[0] == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert average_precision(np.zeros(0), np.zeros((1, 0), dtype=bool), 2)[0] == 0


def precision_by_loops(images, threshold):
    """AP of one class: [(boxes, scores, objects)], the protocol word by word."""
    rows, total = [], 0
    for boxes, scores, objects in images:
        free, total = list(range(len(objects))), total + len(objects)
        for index in np.argsort(-scores, kind="stable"):
            best = max(free, key=lambda j: overlaps(boxes[index : index + 1], objects[j : j + 1])[0, 0], default=None)
            hit = best is not None and overlaps(boxes[index : index + 1], objects[best : best + 1])[0, 0] >= threshold
            if hit:
                free.remove(best)
            rows.append((scores[index], hit))
    rows.sort(key=lambda row: -row[0])
    points, hits = [], 0
    for count, (_, hit) in enumerate(rows, 1):
        hits += hit
        points.append((hits / total, hits / count))
    return sum(max((p for r, p in points if r >= level), default=0.0) for level in np.linspace(0, 1, 101)) / 101


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_average_precision_agrees_with_loops(seed):
    draw = np.random.default_rng(seed)
    images = []
    for _ in range(3):
        corners = draw.uniform(0, 20, (4, 2))
        objects = np.concatenate([corners, corners + draw.uniform(4, 20, (4, 2))], 1)
        boxes = np.concatenate([objects + draw.normal(0, 1.5, objects.shape), draw.uniform(0, 40, (3, 4))])
        scores = draw.permutation(len(boxes)) / 7 + draw.uniform(0, 0.01, len(boxes))
        order = np.argsort(-scores)
        images.append((boxes[order], scores[order], objects))
    right = np.concatenate([match(boxes, objects) for boxes, _, objects in images], axis=1)
    found = average_precision(np.concatenate([scores for _, scores, _ in images]), right, 12)
    for level, threshold in ((0, 0.5), (5, 0.75)):
        assert found[level] == pytest.approx(precision_by_loops(images, threshold), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-20, 60, width=32)] * 4), min_size=1, max_size=5))
def test_cleaned_boxes_lie_inside_and_have_area(rows):
    boxes, kept = clean(torch.tensor(rows), 40, 30)
    left = boxes[kept]
    assert bool((left[:, 2:] > left[:, :2]).all()) and bool((left >= 0).all())
    assert bool((left[:, 2] <= 30).all()) and bool((left[:, 3] <= 40).all())
    for (a, b, c, d), keep in zip(rows, kept.tolist(), strict=True):
        assert keep == (min(c, 30) > max(a, 0) and min(d, 40) > max(b, 0))


def scenes(text="scenes?train=24&test=12&size=48", task=None):
    return load_data(text, task, SOURCES)


def test_scenes_are_a_function_of_their_seed_and_the_boxes_do_not_overlap():
    first, again, other = scenes(), scenes(), scenes("scenes?train=24&test=12&size=48&seed=1")
    batch = first.train.batch(range(24))
    assert (
        torch.equal(batch["image"], again.train.batch(range(24))["image"])
        and first.fingerprint() == again.fingerprint()
    )
    assert not torch.equal(batch["image"], other.train.batch(range(24))["image"])
    assert first.fingerprint() != other.fingerprint()
    counts = (batch["label"] >= 0).sum(1)
    assert int(counts.min()) >= 1 and int(counts.max()) <= 4 and float(batch["image"].min()) >= 0
    for boxes, label in zip(batch["boxes"], batch["label"], strict=True):
        mine = boxes[label >= 0].double().numpy()
        assert float((overlaps(mine, mine) - np.eye(len(mine))).max()) == 0
    sides = (batch["boxes"][..., 2:] - batch["boxes"][..., :2])[batch["label"] >= 0]
    assert float(sides.min()) >= 2 and float(sides.max()) <= 24 and float(sides.max()) > 1.5 * float(sides.mean(0)[1])


def test_digits_are_brighter_than_what_surrounds_them():
    batch = scenes().test.batch(range(12))
    for image, boxes, label in zip(batch["image"], batch["boxes"], batch["label"], strict=True):
        for left, top, right, bottom in boxes[label >= 0].int().tolist():
            assert float(image[0, top:bottom, left:right].max()) > 0.7


@pytest.mark.parametrize("classes", [1, 3, 10])
def test_digits_are_merged_into_groups(classes):
    data = scenes(f"scenes?train=40&test=0&classes={classes}")
    assert len(data.task.options["classes"]) == classes
    labels = data.train.batch(range(40))["label"]
    assert int(labels.max()) == classes - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scenes?size=20", "size must be at least 24"), ("scenes?classes=4", "classes must be 1, 3 or 10"),
        ("scenes?train=0&test=0", "leave nothing"), ("scenes?colour=1", "option 'colour' is unknown"),
        ("scenes:here", "has no location"), ("boxes:nowhere", "no file or folder nowhere"),
    ],
)  # fmt: skip
def test_a_wrong_source_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        scenes(text)


def write_photos(folder, rows, count=5, size=(40, 20)):
    """Black photos with a white rectangle for each row: (file, xmin, ymin, xmax, ymax, class)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        for name, left, top, right, bottom, _ in rows:
            if name == f"{number}.png":
                pixels[max(0, int(top)) : int(bottom), max(0, int(left)) : int(right)] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with open(folder / "boxes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "xmin", "ymin", "xmax", "ymax", "class"), *rows])
    return folder


ROWS = [
    ("0.png", 4, 2, 12, 10, "cat"),
    ("1.png", 20, 4, 36, 18, "dog"),
    ("3.png", 0, 0, 10, 10, "dog"),
    ("4.png", 8, 8, 16, 16, "cat"),
]


def test_photos_are_fitted_with_their_boxes_and_grey_fills_up(tmp_path):
    data = scenes(f"boxes:{write_photos(tmp_path, ROWS)}?size=64&test=0")
    assert data.task.options["classes"] == ["cat", "dog"] and data.task.options["input_shape"] == [3, 64, 64]
    batch = data.train.batch(range(5))
    assert batch["label"].flatten().tolist() == [0, 1, -1, 1, 0]
    torch.testing.assert_close(batch["boxes"][0, 0], torch.tensor([4.0, 2, 12, 10]) * 1.6)
    assert float(batch["image"][0, 0, 8, 12]) == pytest.approx(1.0) and float(batch["image"][0, 0, 60, 3]) == 0.5
    assert float(batch["image"][2].max()) == 0.5  # a photo without objects is black above the filling


def test_a_mirrored_photo_has_mirrored_boxes(tmp_path):
    split = scenes(f"boxes:{write_photos(tmp_path, ROWS)}?size=64&test=0").train
    batch = split.batch([0] * 16, torch.Generator().manual_seed(0))
    lefts = batch["boxes"][:, 0, 0].tolist()
    assert sorted({round(left, 3) for left in lefts}) == [6.4, round(64 - 19.2, 3)]
    for image, box in zip(batch["image"], batch["boxes"][:, 0], strict=True):
        left, top, right, bottom = (int(side) for side in box.tolist())
        assert float(image[0, top + 2 : bottom - 2, left + 2 : right - 2].min()) > 0.9


def test_coco_files_give_the_same_boxes_as_csv(tmp_path):
    by_csv = scenes(f"boxes:{write_photos(tmp_path / 'csv', ROWS)}?size=64&seed=3")
    write_photos(tmp_path / "coco", ROWS)
    (tmp_path / "coco" / "boxes.csv").unlink()
    content = {
        "images": [{"id": 10 + n, "file_name": f"{n}.png"} for n in range(5)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"image_id": 10 + int(name[0]), "bbox": [a, b, c - a, d - b], "category_id": 7 if label == "dog" else 2}
            for name, a, b, c, d, label in ROWS
        ],
    }
    (tmp_path / "coco" / "annotations.json").write_text(json.dumps(content))
    by_coco = scenes(f"boxes:{tmp_path / 'coco'}?size=64&seed=3")
    for name in ("train", "test"):
        a, b = getattr(by_csv, name), getattr(by_coco, name)
        assert a.fingerprint() == b.fingerprint() and len(a) == {"train": 4, "test": 1}[name]


def test_boxes_outside_or_without_area_are_dropped_and_counted(tmp_path):
    rows = [*ROWS, ("2.png", 50, 5, 60, 10, "cat"), ("2.png", 5, 5, 5, 10, "cat"), ("2.png", 30, 10, 90, 90, "dog")]
    data = scenes(f"boxes:{write_photos(tmp_path, rows)}?size=64&test=0")
    assert data.train.dropped == 2
    cut = data.train.batch([2])["boxes"][0, 0]
    torch.testing.assert_close(cut, torch.tensor([30.0, 10, 40, 20]) * 1.6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("9.png", 0, 0, 5, 5, "cat")], "object 1 is in '9.png', which is no photo"),
        ([("0.png", "x", 0, 5, 5, "cat")], "line 2: a corner is no number"),
        ([], "has no objects at all"),
    ],
)
def test_a_wrong_list_of_boxes_is_refused(tmp_path, rows, message):
    write_photos(tmp_path, [])
    with open(tmp_path / "boxes.csv", "a", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(DataError, match=message):
        scenes(f"boxes:{tmp_path}")


def test_a_missing_column_and_a_missing_file_are_named(tmp_path):
    write_photos(tmp_path, ROWS)
    (tmp_path / "boxes.csv").write_text("file,xmin,ymin,xmax,ymax\n")
    with pytest.raises(DataError, match="has no column 'class'"):
        scenes(f"boxes:{tmp_path}")
    (tmp_path / "boxes.csv").unlink()
    with pytest.raises(DataError, match="has neither boxes.csv .* nor annotations.json"):
        scenes(f"boxes:{tmp_path}")
    (tmp_path / "annotations.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="is no COCO file of boxes .KeyError"):
        scenes(f"boxes:{tmp_path}")


def test_a_class_that_the_model_does_not_know_is_refused(tmp_path):
    task = TaskSpec(name="detection", options={"input_shape": [3, 64, 64], "classes": ["cat"]})
    with pytest.raises(DataError, match="has class 'dog' .* none of the model's 1; it knows cat"):
        scenes(f"boxes:{write_photos(tmp_path, ROWS)}", task)
    wider = TaskSpec(name="detection", options={"input_shape": [3, 64, 64], "classes": ["bird", "dog", "cat"]})
    labels = scenes(f"boxes:{tmp_path}?test=0", wider).train.batch(range(5))["label"]
    assert labels.flatten().tolist() == [2, 1, -1, 1, 2]
    with pytest.raises(DataError, match="the model's task is classification, not detection"):
        scenes(task=TaskSpec(name="classification"))


def test_a_model_that_is_no_detector_is_refused():
    data = scenes("scenes?train=8&test=4&size=32")
    task = Detection(DetectionOptions.model_validate(data.task.options))
    with pytest.raises(UnsupportedModelError, match=r"Conv2d gives \(1, 7, 32, 32\), a detector of 3 classes"):
        task.check_fit(torch.nn.Conv2d(1, 7, 1), data)
    with pytest.raises(DataError, match=r"images of shape \(1, 32, 32\), the model expects \(1, 64, 64\)"):
        Detection(DetectionOptions(input_shape=(1, 64, 64), classes=("a", "b", "c"))).check_fit(
            torch.nn.Identity(), data
        )


def test_the_meter_gives_100_for_targets_themselves_and_needs_objects():
    data = scenes("scenes?train=0&test=8&size=64")
    task = Detection(DetectionOptions.model_validate({**data.task.options}))
    batch = data.test.batch(range(8))
    targets = make_targets(batch["boxes"], batch["label"], 3, 16, 16, 4)
    output = torch.cat([torch.logit(targets.heatmap.clamp(1e-4, 1 - 1e-4)), torch.zeros(8, 4, 16, 16)], 1)
    flat = output.flatten(2)
    flat[targets.image, 3:5, targets.pixel], flat[targets.image, 5:, targets.pixel] = targets.size, targets.centre
    meter = task.meter()
    meter.update(output, batch)
    assert meter.compute().values["AP"].value == pytest.approx(100)
    empty = task.meter()
    with pytest.raises(DataError, match="no images"):
        empty.compute()
    empty.update(output[:1], {"boxes": torch.zeros(1, 1, 4), "label": torch.full((1, 1), -1)})
    with pytest.raises(DataError, match="no objects"):
        empty.compute()


def test_photos_train_a_detector_that_predicts_boxes_and_draws_them(tmp_path):
    rows = [*ROWS, ("2.png", 50, 5, 60, 10, "cat")]
    folder = write_photos(tmp_path / "photos", rows)
    train = TrainOptions(epochs=1, batch_size=2, optimizer="adam", lr=1e-3)
    report = apply(
        Recipe(
            model="codenet:small?width=4,8,8&blocks=1&decoder=8&head=4",
            data=f"boxes:{folder}?size=64&test=3&train=2",
            device="cpu",
            train=train,
        ),
        tmp_path / "run",
    )
    assert any("1 t" in text and "dropped" in text for text in report.warnings)
    request = UseRequest(str(tmp_path / "run"), device="cpu")
    shown = predict(request, [folder / "1.png"])[0]
    assert "score" in shown.rows[0] and shown.file is None
    drawn = predict(request, [folder / "1.png"], tmp_path / "drawn.png")[0]
    with Image.open(drawn.file) as image:
        assert image.size == (40, 20)
    assert evaluate(request).metrics.values["AP50"].unit == "%"


def test_predicted_boxes_are_in_pixels_of_the_photo(tmp_path):
    folder = write_photos(tmp_path, ROWS)
    task = Detection(DetectionOptions(input_shape=(3, 64, 64), classes=("cat", "dog")))
    targets = make_targets(torch.tensor([[[32.0, 6.4, 57.6, 28.8]]]), torch.tensor([[1]]), 2, 16, 16, 4)
    output = torch.cat([torch.logit(targets.heatmap.clamp(1e-4, 1 - 1e-4)), torch.zeros(1, 4, 16, 16)], 1)
    flat = output.flatten(2)
    flat[:, 2:4, targets.pixel[0]], flat[:, 4:, targets.pixel[0]] = targets.size, targets.centre
    row = task.show(output, folder / "1.png", None).rows[0]
    assert row["class"] == "dog" and row["score"] > 0.99
    assert [row[side] for side in ("left", "top", "right", "bottom")] == pytest.approx([20, 4, 36, 18], abs=1e-4)


def test_the_fingerprint_changes_with_a_box():
    def split(right):
        return DetectionSplit(
            lambda index: torch.zeros(1, 8, 8),
            [Objects(torch.tensor([[0.0, 0, right, 4]]), torch.tensor([0]))],
            (1, 8, 8),
            "",
        )

    assert split(4.0).fingerprint() == split(4.0).fingerprint() != split(5.0).fingerprint()
