"""Radiomic features as their definitions read: plain loops over voxels, pairs, runs and zones.

After the IBSI reference manual (arXiv 1612.07003), sections 3.3 to 3.8, with the names of pyradiomics; MCC after
Haralick et al. 1973, f14.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Voxel = tuple[int, int, int]
DIRECTIONS = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 1, -1), (1, 0, 1), (1, 0, -1), (1, 1, 0), (1, -1, 0)]
DIRECTIONS += [(1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1)]


def _moved(at: Voxel, by: Voxel, times: int = 1) -> Voxel:
    return at[0] + times * by[0], at[1] + times * by[1], at[2] + times * by[2]


def _bits(p: Iterable[float]) -> float:
    return -sum(q * math.log2(q) for q in p if q > 0)


def _loop_first_order(x: list[float], level: list[int]) -> dict[str, float]:
    n = len(x)
    ordered = sorted(x)

    def percentile(part: float) -> float:
        place = part * (n - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, n - 1)] - ordered[low])

    mean = sum(x) / n
    variance = sum((v - mean) ** 2 for v in x) / n
    middle = [v for v in x if percentile(0.1) <= v <= percentile(0.9)]
    p = [count / n for count in Counter(level).values()]
    return {
        "Energy": sum(v * v for v in x),
        "TotalEnergy": sum(v * v for v in x),
        "Entropy": _bits(p),
        "Minimum": ordered[0],
        "10Percentile": percentile(0.1),
        "90Percentile": percentile(0.9),
        "Maximum": ordered[-1],
        "Mean": mean,
        "Median": percentile(0.5),
        "InterquartileRange": percentile(0.75) - percentile(0.25),
        "Range": ordered[-1] - ordered[0],
        "MeanAbsoluteDeviation": sum(abs(v - mean) for v in x) / n,
        "RobustMeanAbsoluteDeviation": sum(abs(v - sum(middle) / len(middle)) for v in middle) / len(middle),
        "RootMeanSquared": math.sqrt(sum(v * v for v in x) / n),
        "Skewness": sum((v - mean) ** 3 for v in x) / n / variance**1.5,
        "Kurtosis": sum((v - mean) ** 4 for v in x) / n / variance**2,
        "Variance": variance,
        "Uniformity": sum(q * q for q in p),
    }


def _loop_glcm(level: dict[Voxel, int], by: Voxel) -> dict[str, float]:
    counts: Counter[tuple[int, int]] = Counter()
    for at, i in level.items():
        for j in (level.get(_moved(at, by)), level.get(_moved(at, by, -1))):
            if j is not None:
                counts[i, j] += 1
    p = {pair: n / counts.total() for pair, n in counts.items()}
    grey = sorted({i for i, _ in p})
    ng = max(level.values())
    px = {i: sum(q for (a, _), q in p.items() if a == i) for i in grey}
    py = {j: sum(q for (_, b), q in p.items() if b == j) for j in grey}
    mx, my = sum(i * q for i, q in px.items()), sum(j * q for j, q in py.items())
    sx = math.sqrt(sum((i - mx) ** 2 * q for i, q in px.items()))
    sy = math.sqrt(sum((j - my) ** 2 * q for j, q in py.items()))
    plus = {k: sum(q for (i, j), q in p.items() if i + j == k) for k in range(2, 2 * ng + 1)}
    minus = {k: sum(q for (i, j), q in p.items() if abs(i - j) == k) for k in range(ng)}
    da = sum(k * q for k, q in minus.items())
    hxy = _bits(p.values())
    hx, hy = _bits(px.values()), _bits(py.values())
    hxy1 = -sum(q * math.log2(px[i] * py[j]) for (i, j), q in p.items())
    hxy2 = -sum(px[i] * py[j] * math.log2(px[i] * py[j]) for i in grey for j in grey)
    q_matrix = [[sum(p.get((i, k), 0) * p.get((j, k), 0) / (px[i] * py[k]) for k in grey) for j in grey] for i in grey]
    return {
        "Autocorrelation": sum(i * j * q for (i, j), q in p.items()),
        "JointAverage": mx,
        "ClusterProminence": sum((i + j - mx - my) ** 4 * q for (i, j), q in p.items()),
        "ClusterShade": sum((i + j - mx - my) ** 3 * q for (i, j), q in p.items()),
        "ClusterTendency": sum((i + j - mx - my) ** 2 * q for (i, j), q in p.items()),
        "Contrast": sum((i - j) ** 2 * q for (i, j), q in p.items()),
        "Correlation": (sum(i * j * q for (i, j), q in p.items()) - mx * my) / (sx * sy),
        "DifferenceAverage": da,
        "DifferenceEntropy": _bits(minus.values()),
        "DifferenceVariance": sum((k - da) ** 2 * q for k, q in minus.items()),
        "JointEnergy": sum(q * q for q in p.values()),
        "JointEntropy": hxy,
        "Imc1": (hxy - hxy1) / max(hx, hy),
        "Imc2": math.sqrt(1 - math.exp(-2 * (hxy2 - hxy))),
        "Idm": sum(q / (1 + (i - j) ** 2) for (i, j), q in p.items()),
        "MCC": math.sqrt(sorted(np.linalg.eigvals(np.array(q_matrix)).real)[-2]),
        "Idmn": sum(q / (1 + (i - j) ** 2 / ng**2) for (i, j), q in p.items()),
        "Id": sum(q / (1 + abs(i - j)) for (i, j), q in p.items()),
        "Idn": sum(q / (1 + abs(i - j) / ng) for (i, j), q in p.items()),
        "InverseVariance": 2 * sum(q / (i - j) ** 2 for (i, j), q in p.items() if i < j),
        "MaximumProbability": max(p.values()),
        "SumAverage": sum(k * q for k, q in plus.items()),
        "SumEntropy": _bits(plus.values()),
        "SumSquares": sum((i - mx) ** 2 * q for (i, _), q in p.items()),
    }


def _loop_emphases(found: list[tuple[int, int]], voxels: int, size: str, unit: str) -> dict[str, float]:
    """`found` is the (grey level, size) of each run or zone; `size` and `unit` are their words in the names."""
    short, long = ("Short", "Long") if size == "Run" else ("Small", "Large")
    count, n = Counter(found), len(found)
    grey, sizes = Counter(i for i, _ in found), Counter(j for _, j in found)
    mean_i, mean_j = sum(i for i, _ in found) / n, sum(j for _, j in found) / n
    sizes_name = "RunLength" if unit == "Run" else "SizeZone"
    return {
        f"{short}{size}Emphasis": sum(c / j**2 for (_, j), c in count.items()) / n,
        f"{long}{size}Emphasis": sum(c * j**2 for (_, j), c in count.items()) / n,
        "GrayLevelNonUniformity": sum(c * c for c in grey.values()) / n,
        "GrayLevelNonUniformityNormalized": sum(c * c for c in grey.values()) / n**2,
        f"{sizes_name}NonUniformity": sum(c * c for c in sizes.values()) / n,
        f"{sizes_name}NonUniformityNormalized": sum(c * c for c in sizes.values()) / n**2,
        f"{unit}Percentage": n / voxels,
        "GrayLevelVariance": sum(c / n * (i - mean_i) ** 2 for (i, _), c in count.items()),
        f"{unit}Variance": sum(c / n * (j - mean_j) ** 2 for (_, j), c in count.items()),
        f"{unit}Entropy": _bits(c / n for c in count.values()),
        f"LowGrayLevel{unit}Emphasis": sum(c / i**2 for (i, _), c in count.items()) / n,
        f"HighGrayLevel{unit}Emphasis": sum(c * i**2 for (i, _), c in count.items()) / n,
        f"{short}{size}LowGrayLevelEmphasis": sum(c / (i * j) ** 2 for (i, j), c in count.items()) / n,
        f"{short}{size}HighGrayLevelEmphasis": sum(c * (i / j) ** 2 for (i, j), c in count.items()) / n,
        f"{long}{size}LowGrayLevelEmphasis": sum(c * (j / i) ** 2 for (i, j), c in count.items()) / n,
        f"{long}{size}HighGrayLevelEmphasis": sum(c * (i * j) ** 2 for (i, j), c in count.items()) / n,
    }


def loop_runs(level: dict[Voxel, int], by: Voxel) -> list[tuple[int, int]]:
    """(grey level, length) of every run along `by`."""
    found = []
    for at, i in level.items():
        if level.get(_moved(at, by, -1)) == i:
            continue
        length = next(k for k in itertools.count(1) if level.get(_moved(at, by, k)) != i)
        found.append((i, length))
    return found


def _loop_zones(level: dict[Voxel, int]) -> list[tuple[int, int]]:
    left, found = set(level), []
    while left:
        front = [left.pop()]
        grey, size = level[front[0]], 0
        while front:
            at = front.pop()
            size += 1
            for by in itertools.product((-1, 0, 1), (-1, 0, 1), (-1, 0, 1)):
                beside = _moved(at, by)
                if beside in left and level[beside] == grey:
                    left.remove(beside)
                    front.append(beside)
        found.append((grey, size))
    return found


def loop_features(hu: NDArray[np.float64], mask: NDArray[np.bool_], width: float) -> dict[str, float]:
    """The 74 of a region with neighbours in all 13 directions, in grey levels of `width` HU and voxels of 1 mm³."""
    depth, rows, columns = hu.shape
    every = itertools.product(range(depth), range(rows), range(columns))
    value = {at: float(hu[at]) for at in every if mask[at]}
    lowest = math.floor(min(value.values()) / width)
    level = {at: math.floor(v / width) - lowest + 1 for at, v in value.items()}
    glcm = [_loop_glcm(level, by) for by in DIRECTIONS]
    glrlm = [_loop_emphases(loop_runs(level, by), len(level), "Run", "Run") for by in DIRECTIONS]
    families = {
        "firstorder": _loop_first_order(list(value.values()), list(level.values())),
        "glcm": {name: sum(d[name] for d in glcm) / 13 for name in glcm[0]},
        "glrlm": {name: sum(d[name] for d in glrlm) / 13 for name in glrlm[0]},
        "glszm": _loop_emphases(_loop_zones(level), len(level), "Area", "Zone"),
    }
    return {f"{family}_{name}": v for family, of in families.items() for name, v in of.items()}
