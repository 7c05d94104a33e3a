"""How sure a mean score is: 95 % intervals over samples that share pictures.

Questions about one picture are right or wrong together, so the pictures are the units that were drawn, not the
questions. With scores y_i, their mean p over n samples, and S_g the sum of y_i - p over the samples of picture g of G:

    V = max(G / (G - 1) * sum over g of S_g^2 / n^2,  s^2 / n)

The first is the cluster-robust variance of a mean (Liang and Zeger 1986, doi 10.1093/biomet/73.1.13; for scores of
models: Miller 2024, arXiv 2411.00640, without the factor for few clusters), the second that of independent
samples (s^2 with n - 1), below which few pictures may fall by luck.

The interval of a score is Wilson's (1927, doi 10.1080/01621459.1927.10502953), which stays within 0 and 1 and does not
shrink to a point where all answers are right, with the effective number of samples p (1 - p) / V in place of n (G where
V is 0), as Franco et al. (2019, PMC6690503) recommend for clustered surveys, and with Student's t of G - 1 degrees of
freedom in place of the normal quantile. That of a difference of two scores on the same samples is mean +- t sqrt(V).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from rave_jax.data.sample import Sample
from rave_jax.evaluation.paired import Interval, t_975

NO_PICTURE = "sample"
"""How keys of samples without a picture begin."""


def score_interval(scores: Sequence[float], pictures: Sequence[Hashable]) -> Interval:
    """Where the mean score of more such pictures lies; 0 to 1 where there is one picture only.

    Args:
        scores: 0 to 1, at least one.
        pictures: which picture each is about.
    """
    mean, variance, clusters = _moments(scores, pictures)
    if clusters == 1:
        return Interval(0.0, 1.0)
    effective = mean * (1 - mean) / variance if variance > 0 else clusters
    z = t_975(clusters - 1)
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(mean * (1 - mean) / effective + (z / (2 * effective)) ** 2)
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))


def difference_interval(differences: Sequence[float], pictures: Sequence[Hashable]) -> Interval:
    """Where the mean difference of two scores lies over more such pictures; -1 to 1 where there is one picture only.

    Args:
        differences: of the scores of each sample, -1 to 1, at least one.
        pictures: which picture each is about.
    """
    mean, variance, clusters = _moments(differences, pictures)
    if clusters == 1:
        return Interval(-1.0, 1.0)
    half = t_975(clusters - 1) * math.sqrt(variance)
    return Interval(max(mean - half, -1.0), min(mean + half, 1.0))


def _moments(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float, int]:
    """Mean, its variance V, and the number of clusters."""
    n = len(values)
    mean = math.fsum(values) / n
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    G = len(sums)
    if G == 1:
        return mean, 0.0, 1
    robust = G / (G - 1) * math.fsum(s * s for s in sums.values()) / n**2
    independent = math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n
    variance = max(robust, independent)
    # Scores that are all alike differ from their mean by rounding at most.
    return mean, variance if variance > 1e-18 else 0.0, G


def picture_key(sample: Sample, index: int) -> str:
    """The same for samples of the same pictures (files by path, pixels by content); without a picture, its own."""
    digest = hashlib.sha256()
    seen = False
    for message in sample.messages:
        for part in () if isinstance(message["content"], str) else message["content"]:
            given = part.get(part["type"]) if part["type"] in ("image", "video") else []
            for source in given if isinstance(given, (list, tuple)) else [given]:  # a video may be a file
                digest.update(_identity(source))
                seen = True
    return digest.hexdigest() if seen else f"{NO_PICTURE} {index}"


def _identity(source: Any) -> bytes:
    if isinstance(source, (str, os.PathLike)):
        return os.path.realpath(source).encode(errors="surrogateescape") + b"\0"
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    pixels = np.asarray(source)
    return repr((pixels.shape, pixels.dtype.str)).encode() + hashlib.sha256(pixels.tobytes()).digest()
