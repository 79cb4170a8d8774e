"""Numbers as people read them."""

from __future__ import annotations

MISSING = "–"
"""Stands where a number was not measured."""

_SHARES = frozenset(
    {"accuracy", "precision", "recall", "f1", "top1", "top5", "specificity", "auroc", "map", "iou", "miou", "dice"}
    | {"wer", "cer", "exact_match"}
)

LOWER_IS_BETTER = frozenset({"wer", "cer", "mae", "mse", "rmse", "loss", "perplexity", "fid"})
"""Metrics that count errors."""


def is_share(metric: str) -> bool:
    """Whether a metric is a share of 1 that people read in percent.

    Example:
        >>> is_share("wer"), is_share("mae")
        (True, False)
    """
    return metric in _SHARES


def title(name: str) -> str:
    """Return a metric's name for a table: short names are abbreviations.

    Example:
        >>> title("accuracy"), title("wer"), title("exact_match")
        ('Accuracy', 'WER', 'Exact match')
    """
    words = name.replace("_", " ")
    return words.upper() if len(words) <= 4 else words[:1].upper() + words[1:]


def count(value: float | None) -> str:
    """Return a count with three figures and a suffix.

    Example:
        >>> count(1_234_567), count(950), count(None)
        ('1.23 M', '950', '–')
    """
    return _scaled(value, ("", " k", " M", " G", " T", " P"))


def size(value: float | None) -> str:
    """Return bytes with three figures and a decimal unit.

    Example:
        >>> size(48_213), size(0)
        ('48.2 kB', '0 B')
    """
    return _scaled(value, (" B", " kB", " MB", " GB", " TB", " PB"))


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    steps = 0
    while abs(value) >= 999.5 and steps + 1 < len(units):
        value /= 1000
        steps += 1
    return f"{_three(value)}{units[steps]}"


def _three(value: float) -> str:
    """Three figures, without an exponent and without a fraction that says nothing."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def metric(name: str, value: float | None) -> str:
    """Return a metric's value: in percent where it is a share.

    Example:
        >>> metric("accuracy", 0.98331), metric("mae", 0.98331)
        ('98.33 %', '0.9833')
    """
    if value is None:
        return MISSING
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:.4g}"


def change(name: str, before: float | None, after: float | None) -> str:
    """Return how a metric moved, signed; which way is better is the metric's affair, so nothing is judged here.

    Example:
        >>> change("accuracy", 0.987, 0.983), change("mae", 0.5, 0.5), change("wer", 0.11, 0.128)
        ('−0.40 points', '±0', '+1.80 points')
    """
    if before is None or after is None:
        return MISSING
    delta = after - before
    if is_share(name):
        return f"{signed(f'{100 * delta:+.2f}')} points"
    return signed(f"{delta:+.3g}")


def points(share: float) -> str:
    """Return a difference of shares in percentage points.

    Example:
        >>> points(0.01), points(0.005)
        ('1 point', '0.5 points')
    """
    return f"{100 * share:.3g} point" + ("" if round(100 * share, 3) == 1 else "s")


def signed(number: str) -> str:
    """Return a signed number with a true minus, and no sign of its own for zero.

    Example:
        >>> signed("-0.40"), signed("-0.0")
        ('−0.40', '±0.0')
    """
    return f"±{number[1:]}" if float(number) == 0 else number.replace("-", "−")


def times(value: float) -> str:
    """Return a ratio.

    Example:
        >>> times(4.23), times(12.34), times(123.4)
        ('4.2×', '12×', '123×')
    """
    return f"{value:.0f}×" if value >= 9.95 else f"{value:.1f}×"


def percent(value: float) -> str:
    """Return a share in percent.

    Example:
        >>> percent(0.24899), percent(0.4)
        ('24.9 %', '40.0 %')
    """
    return f"{100 * value:.1f} %"


def milliseconds(value: float | None) -> str:
    """Return a latency with three figures.

    Example:
        >>> milliseconds(0.21349), milliseconds(12.0)
        ('0.213 ms', '12.0 ms')
        >>> milliseconds(0.0912)
        '0.0912 ms'
    """
    if value is None:
        return MISSING
    digits = 4 if value < 0.09995 else 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} ms"


def duration(seconds: float | None) -> str:
    """Return a length of time in the two units that matter.

    Example:
        >>> duration(0.31), duration(61.2), duration(7_320)
        ('0.3 s', '1 min 1 s', '2 h 2 min')
    """
    if seconds is None:
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
