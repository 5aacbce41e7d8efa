"""Dividing images so that every class comes near to its share in every part: pure functions of arrays and a seed.

What an image is of is a row of `held` (N, K) bool: one class, or any number of labels. One class an image is divided by
scikit-learn and at random within the classes; several labels by iterative stratification (Sechidis et al. 2011, "On the
stratification of multi-label data"); whole units, such as spatial blocks or groups, greedily.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from iterstrat.ml_stratifiers import IterativeStratification
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from r2kit.errors import DataError


def membership(manifest: pd.DataFrame, num_classes: int) -> np.ndarray:
    """Return what each image of a manifest is of, (N, K) bool.

    Args:
        manifest: Column label (position), or, for several labels, column labels (tuple of positions).
        num_classes: K.
    """
    held = np.zeros((len(manifest), num_classes), dtype=bool)
    if "labels" in manifest:
        for row, positions in enumerate(manifest["labels"]):
            held[row, list(positions)] = True
    else:
        held[np.arange(len(manifest)), manifest["label"].to_numpy(dtype=np.int64)] = True
    return held


def fold_of_each(
    held: np.ndarray,
    classes: tuple[str, ...],
    units: np.ndarray | None,
    folds: int,
    state: int,
    first: np.ndarray,
    same: np.ndarray,
) -> np.ndarray:
    """Return the fold of every image.

    Args:
        held: (N, K) bool.
        classes: K names.
        units: (N,) names of what must stay together, or None.
        folds: How many.
        state: Seed.
        first: Positions of the images that differ; the copies follow them.
        same: (N,) which of `first` each image equals.

    Returns:
        (N,) from 0.

    Raises:
        DataError: If there are too few images or units.
    """
    if units is None:
        counts = held[first].sum(axis=0)
        few, count = f"class '{classes[counts.argmin()]}' has {counts.min()} image(s)", int(counts.min())
    else:
        count = len(np.unique(units.astype(str)))
        few = f"the images lie in {count} group(s) or block(s)"
    if count < folds:
        raise DataError(
            f"data.folds={folds}: {few}, and each fold needs at least one; use at most {max(count, 2)} folds"
        )
    several = bool((held.sum(axis=1) != 1).any())
    label = held.argmax(axis=1)
    fold = np.full(len(held), -1, dtype=np.int64)
    if units is not None and several:
        _, unit = np.unique(units.astype(str), return_inverse=True)
        fold = by_units(held, unit, [1.0 / folds] * folds, np.random.default_rng(state))[unit]
    elif several:
        return iterative(held[first], [1.0 / folds] * folds, state)[same]
    else:
        with warnings.catch_warnings():
            # A class in fewer units than folds; the caller says so in the words of its split.
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            if units is None:
                parts = StratifiedKFold(folds, shuffle=True, random_state=state).split(label[first], label[first])
                for number, (_, held_out) in enumerate(parts):
                    fold[first[held_out]] = number
                return fold[first][same]
            parts = StratifiedGroupKFold(folds, shuffle=True, random_state=state).split(label, label, units.astype(str))
            for number, (_, held_out) in enumerate(parts):
                fold[held_out] = number
    if empty := sorted(set(range(folds)) - set(fold.tolist())):
        raise DataError(f"data.folds={folds}: fold {empty[0]} is empty: groups or blocks are too unequal; use fewer")
    return fold


def stratified(
    held: np.ndarray, classes: tuple[str, ...], fractions: dict[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Divide each class at random, at least one image of it in every part.

    Args:
        held: (N, K) bool.
        classes: K names.
        fractions: Share of each part; 'train' first.
        rng: Source of the order.

    Returns:
        (N,) names of parts.

    Raises:
        DataError: If a class has fewer images than there are parts.
    """
    for value, name in enumerate(classes):
        if (count := int(held[:, value].sum())) < len(fractions):
            raise DataError(
                f"class '{name}' has {count} image(s), and {len(fractions)} parts ({', '.join(fractions)}) need at "
                "least one each; add images or remove the class"
            )
    names = np.array(list(fractions), dtype=object)
    if (held.sum(axis=1) != 1).any():
        number = iterative(held, list(fractions.values()), int(rng.integers(2**32)))
        supply_lacking(held.astype(np.float64), number, len(fractions))
        return names[number]
    part = np.full(len(held), "train", dtype=object)
    label = held.argmax(axis=1)
    for value in range(len(classes)):
        rows = rng.permutation(np.flatnonzero(label == value))
        counts = [max(1, round(fractions[p] * len(rows))) for p in names[1:]]
        while sum(counts) >= len(rows):  # tiny classes: leave one for training
            counts[int(np.argmax(counts))] -= 1
        start = 0
        for p, count in zip(names[1:], counts, strict=True):
            part[rows[start : start + count]] = p
            start += count
    return part


def iterative(held: np.ndarray, fractions: list[float], state: int) -> np.ndarray:
    """Divide images of several labels so that every label comes near to its share, the rarest first.

    Args:
        held: (N, K) bool; images without a label are spread evenly.
        fractions: Share of each part.
        state: Seed.

    Returns:
        (N,) numbers of parts.
    """
    random = np.random.RandomState(state)  # what the library takes
    shuffled = random.permutation(len(held))  # it takes the images of a label in their order
    part = np.empty(len(held), dtype=np.int64)
    part[shuffled] = IterativeStratification(held[shuffled], np.asarray(fractions), random)
    return part


def by_units(held: np.ndarray, unit: np.ndarray, fractions: list[float], rng: np.random.Generator) -> np.ndarray:
    """Choose a part for each unit (block or group) so that every class comes near to its fraction in every part.

    Greedy, in the manner of scikit-learn's StratifiedGroupKFold but for parts of unequal size and any number of labels:
    units that hold much of a class first; each goes where the sum over classes of (share - fraction)^2 / fraction falls
    most. Then a class that a later part lacks gets the smallest unit that the first part can spare.

    Args:
        held: (N, K) bool, what each image is of.
        unit: (N,) number of each image's unit.
        fractions: Wanted share of each part; training first.
        rng: Source of the order among similar units.

    Returns:
        (units,) number of the part.
    """
    counts = np.zeros((unit.max() + 1, held.shape[1]))
    np.add.at(counts, unit, held.astype(np.float64))
    shares = counts / np.maximum(counts.sum(axis=0), 1.0)  # (units, K): of all images of the class
    if (held.sum(axis=1) == 0).any():  # images without any label are shared out too
        bare = np.bincount(unit[held.sum(axis=1) == 0], minlength=len(counts)).astype(np.float64)
        shares = np.concatenate([shares, (bare / bare.sum())[:, None]], axis=1)
    size_order = np.floor(-np.log2(shares.max(axis=1)))
    shuffled = rng.permutation(len(counts))
    wanted = np.asarray(fractions)[:, None]  # (parts, 1)
    filled = np.zeros((len(fractions), shares.shape[1]))
    part = np.empty(len(counts), dtype=np.int64)
    for b in shuffled[np.argsort(size_order[shuffled], kind="stable")]:
        change = (shares[b] * (shares[b] + 2.0 * (filled - wanted)) / wanted).sum(axis=1)
        part[b] = change.argmin()
        filled[part[b]] += shares[b]
    supply_lacking(counts, part, len(fractions))
    return part


def supply_lacking(counts: np.ndarray, part: np.ndarray, parts: int) -> None:
    """Give each later part that lacks a class the smallest unit of it that the first part can spare, in place.

    Args:
        counts: (units, K) images of each class.
        part: (units,) number of the part of each unit; changed.
        parts: How many parts.
    """
    for lacking in range(1, parts):
        for value in range(counts.shape[1]):
            if counts[part == lacking, value].sum() > 0:
                continue
            donors = np.flatnonzero((part == 0) & (counts[:, value] > 0))
            # Not a unit whose loss would take another class out of training.
            spare = [b for b in donors if (counts[part == 0].sum(axis=0) - counts[b])[counts[b] > 0].min() > 0]
            if spare:
                part[min(spare, key=lambda b: counts[b].sum())] = lacking


def level(available: list[int], total: int) -> list[int]:
    """Share `total` over piles as evenly as their sizes allow; what does not divide goes to the first ones."""
    take = [0] * len(available)
    while total > 0 and (open_piles := [i for i, n in enumerate(available) if take[i] < n]):
        each = max(1, total // len(open_piles))
        for i in open_piles:
            step = min(each, available[i] - take[i], total)
            take[i] += step
            total -= step
    return take


def absent(held: np.ndarray) -> list[int]:
    """Return the classes of which (N, K) bool holds no image."""
    return [int(value) for value in np.flatnonzero(~held.any(axis=0))]
