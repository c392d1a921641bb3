"""Source `digits`: the 1797 handwritten digits of scikit-learn, 8 x 8, grey; 60 % train, 40 % test.

The UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak, 1998), stratified
and split by `seed`. Nothing is downloaded. Training uses the digits as they are: they fill their frame, and
a shift by one pixel cuts strokes off (it cost `zoo:digits_cnn` 0.3 points of accuracy, a small ViT far more).
"""

from __future__ import annotations

import torch

from eff.data import Data
from eff.data.augment import Augmentation
from eff.data.classification import make_data
from eff.data.labelled import Found, Labelled
from eff.data.options import ImageOptions, read_options
from eff.data.stores import ArrayStore
from eff.errors import DataError, MissingDependencyError
from eff.schemas import DataSpec, TaskSpec

_LEVELS = 16  # pixels count the dark cells of a 4 x 4 grid


def load_digits(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the digits as images (1, 8, 8) in [0, 1] with the classes "0" to "9".

    Raises:
        DataError: a wrong option. MissingDependencyError: scikit-learn is not installed.
    """
    options = read_options(spec, ImageOptions)
    if spec.location:
        raise DataError(f"data '{spec}': digits has no location; write digits?train=500")
    try:
        from sklearn.datasets import load_digits as load  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependencyError(
            "data 'digits' needs scikit-learn, which is not installed; pip install 'eff-core[digits]'"
        ) from error
    bunch = load()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / _LEVELS
    whole = Labelled(ArrayStore(images), torch.as_tensor(bunch.target, dtype=torch.long))
    classes = tuple(str(digit) for digit in range(10))
    found = Found(classes, whole=whole, train_share=0.6, augmentation=Augmentation())
    return make_data(spec, options, task, found)
