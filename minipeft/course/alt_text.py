"""Alternative texts: what a figure shows, in words, read from the figure itself."""

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer

MOST = 8  # series, bars or labels that are named one by one


def describe(figure) -> str:
    """The figure in words: its title; for each pair of axes theirs, what they measure,
    and each curve, bar, grid and label with its values to three digits."""
    parts = [sentence(figure.get_suptitle())] if figure.get_suptitle() else []
    parts += [describe_axes(ax) for ax in figure.axes if ax.get_label() != "<colorbar>"]
    return " ".join(part for part in parts if part) or "An empty figure."


def describe_axes(ax) -> str:
    title = " ".join(ax.get_title(loc) for loc in ("left", "center", "right"))
    sentences = [sentence(title)] if title.strip() else []
    if ax.axison:
        sentences += [measure("Across", ax.get_xlabel(), ax.get_xscale())]
        sentences += [measure("Up", ax.get_ylabel(), ax.get_yscale())]
    sentences += bars(ax) + grids(ax) + lines(ax) + points(ax)
    if not ax.axison:
        labels = [" ".join(text.get_text().split()) for text in ax.texts]
        labels = [label for label in labels if label]
        if labels:
            sentences.append(f"A drawing with the labels {listed(labels, 24)}.")
    return " ".join(filter(None, sentences))


def sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!")) else text + "."


def measure(direction: str, label: str, scale: str) -> str:
    label = " ".join(label.split())
    if not label:
        return ""
    return f"{direction}: {label}{' (logarithmic)' if scale == 'log' else ''}."


def listed(items: list, most: int = MOST) -> str:
    left = len(items) - most
    return "; ".join(items[:most]) + (f"; and {left} more" if left > 0 else "")


def number(value) -> str:
    return f"{float(value):.3g}"


def visible(label) -> str:
    """A label of the legend, or "" for matplotlib's own ("_child3")."""
    label = " ".join(str(label).split())
    return "" if label.startswith("_") else label


def tick_names(axis) -> dict:
    """{place: the word written there}, where ticks are words rather than numbers."""
    names = {}
    for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels()):
        word = " ".join(text.get_text().split())
        if word and not says(word, place):
            names[float(place)] = word
    return names


def says(word: str, place: float) -> bool:
    """Is the word the number of its place?"""
    try:
        return float(word.replace("\N{MINUS SIGN}", "-")) == place
    except ValueError:
        return False


def bars(ax) -> list:
    """A sentence for each series of bars. Stacked bars are often drawn one by one, and
    labelled once: then their colour says which series they belong to."""
    containers = [each for each in ax.containers if isinstance(each, BarContainer)]
    labels = {
        bar.get_facecolor(): visible(container.get_label())
        for container in reversed(containers)
        for bar in container
        if visible(container.get_label())
    }
    series = {}
    for container, places in zip(containers, bar_places(containers)):
        across = container.orientation == "horizontal"
        names = tick_names(ax.yaxis if across else ax.xaxis)
        for bar, place in zip(container, places):
            label = visible(container.get_label())
            label = label or labels.get(bar.get_facecolor(), "")
            value = bar.get_width() if across else bar.get_height()
            name = names.get(round(place, 6), number(place))
            series.setdefault(label, []).append(f"{name} {number(value)}")
    return [
        f"Bars{f', {label}' if label else ''}: {listed(said)}."
        for label, said in series.items()
    ]


def bar_places(containers) -> list:
    """Where the bars stand, a list for each container. Bars of several series side by
    side stand where the middle of their group is, as the ticks do."""

    def middle(bar, across):
        if across:
            return bar.get_y() + bar.get_height() / 2
        return bar.get_x() + bar.get_width() / 2

    places = [
        [middle(bar, container.orientation == "horizontal") for bar in container]
        for container in containers
    ]
    if len({len(each) for each in places}) == 1 and len(places[0]) > 1:
        middles = [sum(group) / len(group) for group in zip(*places)]
        return [middles] * len(places)
    return places


def grids(ax) -> list:
    found = []
    for image in ax.images:
        values = np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan)
        size = f"{values.shape[0]} rows and {values.shape[1]} columns"
        if values.ndim == 2 and np.isfinite(values).any():
            least, most = number(np.nanmin(values)), number(np.nanmax(values))
            size += f", values from {least} to {most}"
        found.append(f"A grid of {size}.")
    return found


def lines(ax) -> list:
    named, alone, unnamed = [], [], 0
    for line in ax.get_lines():
        x, y = (np.ma.asarray(data, float) for data in line.get_data(orig=False))
        finite = np.isfinite(np.ma.filled(y, np.nan))
        label = visible(line.get_label())
        if not finite.any():
            continue
        if not label:
            unnamed += 1
            continue
        y = np.asarray(y)[finite]
        if len(y) == 1:
            alone.append(f"{label} {number(y[0])}")
            continue
        if np.ptp(y) == 0:
            named.append(f"{label}: {number(y[0])}")
            continue
        path = f"{label}: from {number(y[0])} to {number(y[-1])}"
        if min(y) < min(y[0], y[-1]):
            path += f", lowest {number(min(y))}"
        if max(y) > max(y[0], y[-1]):
            path += f", highest {number(max(y))}"
        named.append(path)
    said = [f"Lines: {listed(named)}."] if named else []
    said += [f"Points: {listed(alone)}."] if alone else []
    if unnamed and not said:
        said.append("One line." if unnamed == 1 else f"{unnamed} lines.")
    return said


def points(ax) -> list:
    groups = []
    for collection in ax.collections:
        count, label = len(collection.get_offsets()), visible(collection.get_label())
        if label and count:
            groups.append(f"{label} ({count})")
    return [f"Points: {listed(groups)}."] if groups else []


def luminance(colour) -> float:
    """The relative luminance of a colour, 0 to 1 (WCAG 2.2)."""
    parts = np.array(to_rgb(colour))
    parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(parts @ [0.2126, 0.7152, 0.0722])


def contrast(one, other="white") -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2.2)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
