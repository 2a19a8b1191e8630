"""A matplotlib figure that Jupyter shows. Importing this module imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class PreviewFigure(Figure):
    """A figure that is the value of a cell is shown, although pyplot does not know it.

    Jupyter shows plain figures only once pyplot has registered how, for the whole process.
    """

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", bbox_inches="tight")  # as IPython does for figures of pyplot
        return image.getvalue()
