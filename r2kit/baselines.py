"""Two honest yardsticks for an image classifier: the majority class, and colour alone.

A network that does not beat a logistic regression on the mean and the standard deviation of each band has learned
nothing that needed a network.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from r2kit.data.preprocess import missing_pixels


def band_features(image: NDArray[np.generic], nodata: float | None = None) -> NDArray[np.float64]:
    """Return the mean and the standard deviation of each band, in the raw units of the pixels.

    Args:
        image: (H, W, C), any real dtype, as read from the file.
        nodata: Pixel value that means "not observed"; NaN always does. Such pixels are left out.

    Returns:
        (2C,): C means, then C standard deviations (of the population). A band without any observed pixel is NaN.
    """
    missing = missing_pixels(image, nodata)
    pixels = image.reshape(-1, image.shape[-1]).astype(np.float64)
    known = np.ones(pixels.shape, dtype=bool) if missing is None else ~missing.reshape(pixels.shape)
    count = known.sum(axis=0)
    filled = np.where(known, pixels, 0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that the docstring promises
        mean = filled.sum(axis=0) / count
        variance = (np.where(known, pixels - mean, 0.0) ** 2).sum(axis=0) / count
    return np.concatenate([mean, np.sqrt(variance)])


def majority_class(label: ArrayLike, num_classes: int) -> int:
    """Return the most frequent of the classes 0..K-1 in (N,) labels; the lowest number among equals.

    Raises:
        ValueError: If there is no label.
    """
    labels = np.asarray(label)
    if labels.size == 0:
        raise ValueError("the majority class of no images is not defined")
    return int(np.bincount(labels, minlength=num_classes).argmax())


def logistic_regression(
    train_features: NDArray[np.float64], train_label: ArrayLike, features: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Fit a logistic regression on one set of images and predict the classes of another.

    Features are standardised by the training images; a feature that is NaN takes the training mean. L2 penalty with
    scikit-learn's default C = 1; the solver has no randomness.

    Args:
        train_features: (N, F), see `band_features`.
        train_label: (N,) class numbers; with a single class among them, that class is the answer.
        features: (M, F).

    Returns:
        (M,) predicted class numbers.

    Raises:
        ValueError: If there is no training image.
    """
    labels = np.asarray(train_label, dtype=np.int64)
    if labels.size == 0:
        raise ValueError("a logistic regression needs training images")
    if np.unique(labels).size == 1:
        return np.full(len(features), labels[0], dtype=np.int64)
    known = ~np.isnan(train_features)
    centre = np.where(known, train_features, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    with warnings.catch_warnings():
        # Separable classes can stop at the iteration limit; the answer is then as good as the optimum's.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.where(known, train_features, centre), labels)
    if len(features) == 0:
        return np.zeros(0, dtype=np.int64)
    predicted: NDArray[np.int64] = model.predict(np.where(np.isnan(features), centre, features))
    return predicted
