"""The cells of `make calibrate`: a study of known truth is simulated again and again, and its estimate held against the truth.

Exact methods must cover 93.5 to 96.5 % at a nominal 95 %. Conservative ones (sign test, order statistics, Clopper-Pearson,
HC3) and simulated ones (bootstrap) at least 93.5 %, in a stated range, and must give no interval outside it. With 2,000
studies a coverage has a standard error of 0.5 points, so these limits are three of them. The seed of every cell is fixed
by its name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from analysis import estimate
from analysis.estimate import MARGIN, Interval
from analysis.estimate import maps as maps_module
from tests.report import Row

STUDIES = 2000
SD = 0.1
"""points between seeds, as published for ImageNet (0.07 to 0.13)"""

EXACT = (0.935, 0.965)
FALSE = 0.06
"""at most this share of false 'differs' and 'equivalent', each at a nominal 5 %"""

FALSE_ONE_SIDED = 0.065
"""of 'non-inferior', which is exactly 5 % where the others are less: three standard errors above it"""

Rng = np.random.Generator


@dataclass(frozen=True)
class Cell:
    name: str
    make: Callable[..., Iterator[Row]]
    """(rng, number of studies, **arguments) -> its rows"""
    arguments: dict[str, object] = field(default_factory=dict)
    weight: float = 1.0
    """cost, relative to the others"""

    def rows(self, studies: int) -> list[Row]:
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        made = self.make(np.random.default_rng(seed), studies, **self.arguments)
        return [replace(row, name=f"{self.name}: {row.name}") for row in made]


def table() -> list[Cell]:
    cells = [Cell(f"mean, n = {n}", mean, {"n": n}) for n in (2, 3, 8)]
    cells += [Cell(f"sampling error of {images:,} images", sampling, {"images": images}) for images in (500, 5000, 50_000)]
    cells += [Cell(f"median, n = {n}", median, {"n": n}) for n in (5, 6, 9, 16)]
    cells += [Cell(f"Welch, n = {a}, {b}, sd 1 : {ratio:g}", welch, {"a": a, "b": b, "ratio": ratio}, 2) for a, b, ratio in WELCH]
    cells += [Cell(f"paired, n = {n}, correlation {r:g}", paired, {"n": n, "r": r}, 2) for n, r in ((3, 0.0), (5, 0.5), (8, 0.9))]
    cells += [Cell(f"six pairs of four arms, n = {n}", family, {"n": n}, 8) for n in (5, 8)]
    cells += [Cell(f"seeds x images, n = {n}", over_images, {"n": n, "images": 1000}, 8) for n in (3, 5, 8)]
    cells += [Cell(f"expected best of {k} of {n}", best, {"n": n, "budget": k}) for n, k in ((16, 4), (32, 16))]
    cells += [Cell(f"tuned with {k} of {n}", tuned, {"n": n, "budget": k}) for n, k in TUNED]
    cells += [Cell(f"tuned difference with {k} of {n}", tuned_difference, {"n": n, "budget": k}, 4) for n, k in TUNED]
    cells += [Cell(f"beats with {k} of {n}", beats, {"n": n, "budget": k}, 2) for n, k in BEATS]
    cells += [Cell(f"non-inferior from n on, {n} points", noninferior, {"n": n}, 8) for n in (32, 64)]
    cells += [Cell(f"gap at equal loss, n = {n}", gap, {"n": n}, 2) for n in (3, 8, 32)]
    cells += [Cell(f"map, tilt {tilt:g}, sd {sd:g}", decoupling, {"tilt": tilt, "sd": sd}, 40) for tilt, sd in MAPS]
    cells += [Cell("best decay between budgets", transfer, {}, 60)]
    return [*cells, Cell("maps from separable to diagonal", ranked), Cell("map, axes swapped or reordered", relabelled)]


WELCH = ((3, 3, 1.0), (5, 5, 1.0), (8, 8, 1.0), (8, 8, 3.0), (5, 8, 2.0))
TUNED = ((16, 1), (16, 2), (16, 4), (32, 1), (32, 5), (32, 16), (64, 12), (100, 18), (100, 40))
BEATS = ((16, 1), (16, 8), (32, 1), (32, 4), (32, 16), (64, 8), (16, 12))
MAPS = ((0.0, 0.3), (0.0, 1.0), (0.25, 0.5), (0.5, 0.5), (1.0, 0.5))


# ----------------------------------------------------------------------------------------------------- rows


def exact(hits: list[bool], what: str = "coverage") -> Row:
    share = float(np.mean(hits))
    ok = EXACT[0] <= share <= EXACT[1]
    note = f"of 95 %; must lie in {100 * EXACT[0]:.1f} to {100 * EXACT[1]:.1f} %"
    return Row(what, share, EXACT[0] if share < 0.95 else EXACT[1], ok, note, exceeds=share < 0.95)


def at_least(hits: list[bool], what: str = "coverage", note: str = "") -> Row:
    share = float(np.mean(hits))
    return Row(what, share, EXACT[0], share >= EXACT[0], note or "conservative or simulated: at least", exceeds=True)


def at_most(found: list[bool], what: str) -> Row:
    share = float(np.mean(found))
    limit = FALSE_ONE_SIDED if "non-inferior" in what else FALSE
    return Row(what, share, limit, share <= limit)


def no_interval(given: list[bool], why: str) -> Row:
    return Row("intervals given", float(np.sum(given)), 0, not any(given), why)


def holds(interval: Interval | None, truth: float) -> bool:
    return interval is not None and interval[0] <= truth <= interval[1]


# ------------------------------------------------------------------------------------------- arms and pairs


def mean(rng: Rng, studies: int, n: int) -> Iterator[Row]:
    yield exact([holds(estimate.mean(values).interval, 23.0) for values in 23 + SD * rng.standard_normal((studies, n))])


def sampling(rng: Rng, studies: int, images: int) -> Iterator[Row]:
    rates = rng.uniform(0.05, 0.4, size=studies)  # a fixed rate would show the steps of the binomial, not the method
    errors = 100 * rng.binomial(images, rates) / images
    found = [estimate.sampling_error(error, images).interval for error in errors]
    yield exact([holds(interval, 100 * rate) for interval, rate in zip(found, rates, strict=True)])


def median(rng: Rng, studies: int, n: int) -> Iterator[Row]:
    found = [estimate.median(values).interval for values in rng.lognormal(size=(studies, n))]
    if n < 6:
        yield no_interval([interval is not None for interval in found], f"{n} values cannot hold a median at 95 %")
    else:
        yield at_least([holds(interval, 1.0) for interval in found])


def welch(rng: Rng, studies: int, a: int, b: int, ratio: float) -> Iterator[Row]:
    of_a, of_b = SD * rng.standard_normal((studies, a)), ratio * SD * rng.standard_normal((studies, b))
    yield from _pair("welch", of_a, of_b)


def paired(rng: Rng, studies: int, n: int, r: float) -> Iterator[Row]:
    common = rng.standard_normal((studies, n))
    of_a, of_b = (SD * (math.sqrt(r) * common + math.sqrt(1 - r) * rng.standard_normal((studies, n))) for _ in range(2))
    yield from _pair("paired", of_a, of_b)
    if n > 3:  # Fisher's interval is an approximation, a little wide with few seeds
        found = [estimate.difference(a, b, "paired").correlation_interval for a, b in zip(of_a, of_b, strict=True)]
        yield at_least([holds(one, r) for one in found], "coverage of the seed correlation")


def _pair(method: estimate.Method, of_a: np.ndarray, of_b: np.ndarray) -> Iterator[Row]:
    """No difference, and one of exactly the margin, where equivalence is as hard to tell as it gets."""
    none = [estimate.difference(a, b, method) for a, b in zip(of_a, of_b, strict=True)]
    margin = [estimate.difference(a + MARGIN, b, method) for a, b in zip(of_a, of_b, strict=True)]
    hits = [holds(d.interval, 0.0) for d in none]
    # Satterthwaite's degrees of freedom are an approximation: with three or four seeds a side the interval is a little wide
    few = method == "welch" and min(of_a.shape[1], of_b.shape[1]) < 5
    yield at_least(hits, note="Welch below five seeds: at least") if few else exact(hits)
    yield at_most([d.verdict in ("better", "worse") for d in none], "false 'differs'")
    yield at_most([d.verdict == "equivalent" for d in margin], "false 'equivalent'")
    yield at_most([d.noninferior for d in margin], "false 'non-inferior'")


def family(rng: Rng, studies: int, n: int) -> Iterator[Row]:
    pairs = [(i, j) for i in range(4) for j in range(i)]
    held, differs, equivalent = [], [], []
    apart = MARGIN * np.array([0, 1, 2, 3])
    for arms in SD * rng.standard_normal((studies, 4, n)):
        same = [estimate.difference(arms[i], arms[j], family=len(pairs)) for i, j in pairs]
        held.append(all(holds(d.simultaneous, 0.0) for d in same))
        differs.append(any(d.verdict in ("better", "worse") for d in same))
        moved = arms + apart[:, None]
        equivalent.append(any(estimate.difference(moved[i], moved[j], family=len(pairs)).verdict == "equivalent" for i, j in pairs))
    yield at_least(held, "all six hold", "Bonferroni: at least")
    yield at_most(differs, "any false 'differs'")
    yield at_most(equivalent, "any false 'equivalent'")


def over_images(rng: Rng, studies: int, n: int, images: int) -> Iterator[Row]:
    """A probit model: an image is hard (for both arms, or for one of them), a seed is weak, and the rest is chance."""
    hard, own, weak, chance = 1.0, 0.3, 0.01, 0.5
    spread = math.sqrt(hard**2 + own**2 + weak**2 + chance**2)
    abilities = (1.0, 0.95)
    truth = 100 * float(stats.norm.sf(abilities[0] / spread) - stats.norm.sf(abilities[1] / spread))

    def arm(common: np.ndarray, ability: float) -> np.ndarray:
        difficulty = common + own * rng.standard_normal(images, dtype=np.float32)
        seeds = weak * rng.standard_normal((n, 1), dtype=np.float32)
        return difficulty + seeds + chance * rng.standard_normal((n, images), dtype=np.float32) < ability

    hits = []
    for _ in range(studies):
        common = hard * rng.standard_normal(images, dtype=np.float32)
        a, b = (arm(common, ability) for ability in abilities)
        found = estimate.difference_over_images(a, b)
        hits.append(holds(found.interval, truth))
    yield exact(hits)


# --------------------------------------------------------------------------------------------------- tuning

SHAPE = 3.0
"""of the errors of a search: 20 + chi-square, a hard floor and a long tail"""


def searched(rng: Rng, size: tuple[int, ...], worse: float = 0.0) -> np.ndarray:
    return 20 + worse + rng.chisquare(SHAPE, size=size)


def _tuned_truth(budget: int) -> float:
    return 20 + float(stats.chi2.ppf(1 - 0.5 ** (1 / budget), SHAPE))


def _carried(n: int, budget: int) -> bool:
    """Whether n points carry a 95 % interval of what half of all searches of `budget` reach."""
    return 0.5 ** (n / budget) <= 0.025


def best(rng: Rng, studies: int, n: int, budget: int) -> Iterator[Row]:
    """Without replacement the estimate is unbiased; its mean over the studies must lie at the truth."""
    found = [estimate.expected_best(values, budget, replacement=False).value for values in searched(rng, (studies, n))]
    # E[min of n] = floor + integral of the survival function to the power of n
    grid = np.linspace(0, 60, 200_001)
    truth = 20 + float(np.trapezoid(stats.chi2.sf(grid, SHAPE) ** budget, grid))
    off = abs(float(np.mean(found)) - truth) / (float(np.std(found)) / math.sqrt(studies))
    yield Row("bias in standard errors", off, 3.0, off <= 3.0, f"mean {np.mean(found):.4f}, truth {truth:.4f}")


def tuned(rng: Rng, studies: int, n: int, budget: int) -> Iterator[Row]:
    found = [estimate.tuned(values, budget).interval for values in searched(rng, (studies, n))]
    if _carried(n, budget):
        yield at_least([holds(interval, _tuned_truth(budget)) for interval in found])
    else:
        yield no_interval([interval is not None for interval in found], "uncalibrated at this budget")


def tuned_difference(rng: Rng, studies: int, n: int, budget: int) -> Iterator[Row]:
    pairs = list(zip(searched(rng, (studies, n)), searched(rng, (studies, n)), strict=True))
    none = [estimate.tuned_difference(a, b, budget) for a, b in pairs]
    if not _carried(n, budget):
        yield no_interval([d.interval is not None for d in none], "uncalibrated at this budget")
        return
    yield at_least([holds(d.interval, 0.0) for d in none])
    yield at_most([d.verdict in ("better", "worse") for d in none], "false 'differs'")
    margin = 2.0  # of the spread of these searches, as 0.2 points could never be shown
    moved = [estimate.tuned_difference(a + margin, b, budget, margin=margin) for a, b in pairs]
    yield at_most([d.verdict == "equivalent" for d in moved], "false 'equivalent'")
    yield at_most([d.noninferior for d in moved], "false 'non-inferior'")


def beats(rng: Rng, studies: int, n: int, budget: int) -> Iterator[Row]:
    grid = np.linspace(0, 80, 400_001)
    for worse in (0.0, 0.5, 2.0):
        # P(min of a < min of b) = integral of P(min of b > x) dP(min of a <= x)
        survives_b = np.where(grid < worse, 1.0, stats.chi2.sf(np.maximum(grid - worse, 0.0), SHAPE) ** budget)
        ended_a = 1 - stats.chi2.sf(grid, SHAPE) ** budget
        truth = float((0.5 * (survives_b[1:] + survives_b[:-1]) * np.diff(ended_a)).sum())
        drawn = zip(searched(rng, (studies, n)), searched(rng, (studies, n), worse), strict=True)
        found = [estimate.beats(a, b, budget).interval for a, b in drawn]
        if n // budget < 2:
            yield no_interval([interval is not None for interval in found], "uncalibrated at this budget")
            return
        yield at_least([holds(interval, truth) for interval in found], f"coverage of {truth:.3f}")


def noninferior(rng: Rng, studies: int, n: int) -> Iterator[Row]:
    margin = 1.0
    drawn = zip(searched(rng, (studies, n), margin), searched(rng, (studies, n)), strict=True)
    yield at_most([estimate.noninferior_from(a, b, margin) is not None for a, b in drawn], "false 'non-inferior from n'")


# ------------------------------------------------------------------------------------------- curves and maps


def gap(rng: Rng, studies: int, n: int) -> Iterator[Row]:
    hits, given, differs = [], [], []
    for _ in range(studies):
        sides = []
        for extra in (0.0, 0.0):
            loss = np.exp(rng.uniform(-3, 0, size=n))
            level = 20 + 3 * np.log(loss) + 0.8 * np.log(loss) ** 2
            sides.append({"loss": loss, "error": level + extra + (0.3 + 0.3 * loss) * rng.standard_normal(n)})
        found = estimate.gap(*sides)
        given.append(found.interval is not None)
        if found.interval is not None:
            hits.append(holds(found.interval, 0.0))
        differs.append(found.verdict in ("better", "worse"))
    if n < 8:
        yield no_interval(given, f"{n} trials an arm are too few")
        return
    yield at_least(hits, note=f"an interval in {100 * np.mean(given):.0f} % of the studies; HC3: at least")
    yield at_most(differs, "false 'differs'")


LR, DECAY = np.logspace(-3, 0, 7), np.logspace(-3, 0, 7)
SEEDS = 2


def surface(tilt: float, steep: float = 6.0, across: float = 3.0, centre: float = 0.0) -> np.ndarray:
    """(7, 7) errors; the best log decay moves by -tilt a decade of learning rate: 0 separable, 1 diagonal."""
    x, y = np.meshgrid(np.log10(LR) + 1.5, np.log10(DECAY) + 1.5 - centre, indexing="ij")
    return 5 + steep * (y + tilt * x) ** 2 + across * x**2


def index(errors: np.ndarray, rng: Rng) -> estimate.Decoupling:
    return estimate.decoupling_index(errors, LR, DECAY, rng=rng)


def true_index(errors: np.ndarray) -> tuple[float, float, float]:
    """(share, slope, best) of a map without noise, by the definition."""
    fits = maps_module._Fits(np.log10(LR), np.log10(DECAY))
    share, slope, best = fits.of(errors[None], maps_module.WITHIN, np.zeros_like(errors))
    return float(share[0]), float(slope[0]), float(best[0])


def decoupling(rng: Rng, studies: int, tilt: float, sd: float) -> Iterator[Row]:
    errors = surface(tilt)
    share, slope, _ = true_index(errors)
    found = [index(errors[:, :, None] + sd * rng.standard_normal((*errors.shape, SEEDS)), rng) for _ in range(studies)]
    yield at_least([holds(d.share_interval, share) for d in found], f"coverage of share {share:.3f}")
    yield at_least([holds(d.slope_interval, slope) for d in found], f"coverage of slope {slope:.2f}")


def transfer(rng: Rng, studies: int) -> Iterator[Row]:
    """The best lambda_norm moves by a quarter of a decade between budgets of 1,000 and 8,000 steps."""
    moved = 0.25
    before, after = surface(0.0), surface(0.0, centre=moved)
    hits = []
    for _ in range(studies):
        of = [index(errors[:, :, None] + 0.5 * rng.standard_normal((*errors.shape, SEEDS)), rng) for errors in (before, after)]
        hits.append(holds(estimate.transfer(*of, (1000, 8000)).raw_interval, math.log2(10) * moved - 1.5))
    yield at_least(hits, "coverage of the raw shift")


def ranked(rng: Rng, studies: int) -> Iterator[Row]:
    """Noisy maps of rising tilt: their shares must rise with it."""
    tilts = np.linspace(0, 1, 11)
    for steep, across in ((6.0, 3.0), (4.0, 4.0), (3.0, 6.0)):
        shares = [index(surface(t, steep, across)[:, :, None] + 0.5 * rng.standard_normal((7, 7, SEEDS)), rng).share for t in tilts]
        rank = float(stats.spearmanr(tilts, shares).statistic)
        note = f"shares {shares[0]:.3f} to {shares[-1]:.3f}"
        yield Row(f"rank correlation, {steep:g} : {across:g}", rank, 0.95, rank >= 0.95, note, exceeds=True)
    # the positive control: paper lambda = alpha * torch weight_decay, so in torch units every row moves by its alpha
    errors = surface(0.0)
    replotted = np.full((7, 13), np.nan)
    for i in range(7):
        replotted[i, 6 - i : 13 - i] = errors[i]
    d = estimate.decoupling_index(replotted, LR, np.logspace(-3, 3, 13), rng=rng)
    off = abs(d.slope + 1)
    yield Row("separable map in torch units: slope from -1", off, 0.2, off <= 0.2 and d.share > 0.2, f"{d.slope:.2f}, share {d.share:.2f}")


def relabelled(rng: Rng, studies: int) -> Iterator[Row]:
    worst = 0.0
    for tilt in (0.0, 0.3, 1.0):
        errors = surface(tilt) + 0.5 * rng.standard_normal((7, 7))
        share = index(errors, rng).share
        swapped = estimate.decoupling_index(errors.T, DECAY, LR, rng=rng).share
        rows, columns = rng.permutation(7), rng.permutation(7)
        reordered = index(errors[rows][:, columns], rng).share
        worst = max(worst, abs(swapped - share), abs(reordered - share))
    yield Row("change of the share", worst, 1e-8, worst <= 1e-8)
