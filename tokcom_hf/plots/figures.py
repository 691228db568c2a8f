"""Helpers of all figures: imports matplotlib without a display, handles its absence, and saves a figure."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

NO_MATPLOTLIB = "matplotlib is not installed, so no plots are drawn; pip install 'tokcom_hf[plots]'."
Arguments = ParamSpec("Arguments")


def pyplot() -> Any:
    """matplotlib.pyplot without a display, or None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def drawn_or_not(draw: Callable[Arguments, None]) -> Callable[Arguments, bool]:
    """Decorates a drawing function: it returns True after drawing, or False without drawing where matplotlib is missing."""

    @wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> bool:
        if pyplot() is None:
            return False
        draw(*args, **kwargs)
        return True

    return wrapper


def save(figure: Any, path: str | Path, dpi: int = 110) -> None:
    """Writes `figure` to `path` and closes it, which frees its memory."""
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)
