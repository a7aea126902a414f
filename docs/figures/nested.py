"""Draws the picture of README and docs: one embedding, four prefixes. python docs/figures/nested.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PREFIXES = {
    64: "first 64: search millions",
    128: "first 128",
    192: "first 192",
    256: "all 256: decide",
}
SHADES = ("#08306b", "#2171b5", "#6baed6", "#c6dbef")  # dark to light: readable without colour
TEXT = "#222222"
LEFT, WIDTH = 5.4, 6.4  # of the vector


def draw():
    plt.rcParams |= {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "mrl"}
    figure, axes = plt.subplots(figsize=(10, 3.9))
    axes.set(xlim=(0, 14.6), ylim=(0.15, 5.1))
    axes.axis("off")

    times = np.linspace(0, 1, 400)
    envelope = np.exp(-((times - 0.3) ** 2) / 0.02) + 0.7 * np.exp(-((times - 0.72) ** 2) / 0.015)
    axes.plot(0.2 + 1.8 * times, 4.1 + 0.45 * envelope * np.sin(150 * times), color=TEXT, lw=0.8)
    axes.text(1.1, 3.3, "speech, 16 kHz,\nany length", ha="center", va="top", color=TEXT)

    box = FancyBboxPatch((2.75, 3.6), 1.75, 1.0, boxstyle="round,pad=0.08", fc="#eeeeee", ec=TEXT)
    axes.add_patch(box)
    axes.text(3.62, 4.1, "ReDimNet", ha="center", va="center", weight="bold", color=TEXT)
    axes.text(3.62, 3.3, "one network,\none pass", ha="center", va="top", color=TEXT)
    for start, end in ((2.1, 2.62), (4.63, 5.3)):
        axes.add_patch(FancyArrowPatch((start, 4.1), (end, 4.1), arrowstyle="-|>", **ARROW))

    for shade, low in zip(SHADES, range(0, 256, 64)):
        x = LEFT + WIDTH * low / 256
        axes.add_patch(Rectangle((x, 3.75), WIDTH / 4, 0.7, fc=shade, ec="white", lw=1.5))
    axes.text(LEFT, 4.62, "one embedding, 256 dimensions", color=TEXT, weight="bold")
    for row, (size, label) in enumerate(PREFIXES.items()):
        y, width = 2.75 - 0.72 * row, WIDTH * size / 256
        for shade, low in zip(SHADES, range(0, size, 64)):
            x = LEFT + WIDTH * low / 256
            axes.add_patch(Rectangle((x, y), WIDTH / 4, 0.36, fc=shade, ec="white", lw=1.0))
        axes.plot([LEFT + width] * 2, [y, 3.75], color=TEXT, lw=0.8, ls=(0, (3, 3)))
        axes.text(
            LEFT + width + 0.15, y + 0.18, label, va="center", color=TEXT, backgroundcolor="white"
        )
    return figure


ARROW = {"mutation_scale": 16, "color": TEXT, "lw": 1.2}

if __name__ == "__main__":
    figure = draw()
    options = {"bbox_inches": "tight", "facecolor": "white", "metadata": {"Date": None}}
    figure.savefig(Path(__file__).with_suffix(".svg"), **options)
