"""The figures of this library, which a notebook shows as it shows those of pyplot.

Imported where a figure is drawn, since matplotlib is optional.
"""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that is the result of a notebook's cell as a picture, with no backend chosen.

    Notebooks learn to show figures when pyplot is imported there, which nothing here needs.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()
