"""A picture of the images that a classifier misclassifies."""

import numpy as np
import torch
from matplotlib.figure import Figure

from ws_detectron.evaluation.figure_style import add_title

from .files import FASHION_CLASSES

ROWS, COLUMNS = 5, 8


def draw_misclassified(
    training: str, logits: torch.Tensor, images: torch.Tensor, labels: torch.Tensor
) -> Figure:
    """Draws the misclassified images with the highest confidence.

    Args:
        training: what was trained, for the title, as "GN+WS, batch 2".
        logits: (N, 10).
        images: (N, 1, 28, 28).
        labels: (N,) classes.
    """
    confidence, predicted = (values.cpu().numpy() for values in logits.softmax(1).max(1))
    truth = labels.cpu().numpy()
    wrong = np.flatnonzero(predicted != truth)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")]
    figure = Figure(figsize=(1.5 * COLUMNS, 1.75 * ROWS + 0.5), layout="constrained")
    panels = list(figure.subplots(ROWS, COLUMNS).flat)
    for panel in panels:
        panel.axis("off")
    for panel, index in zip(panels, worst):
        panel.imshow(images[index, 0].cpu().numpy(), cmap="gray_r")
        panel.set_title(
            f"predicted {FASHION_CLASSES[predicted[index]]}, {100 * confidence[index]:.0f} %\n"
            f"labeled {FASHION_CLASSES[truth[index]]}",
            fontsize=8,
        )
    add_title(
        figure,
        f"Fashion-MNIST, classifier of the 2019 report, {training}: {len(wrong):,} of "
        f"{len(truth):,} test images are misclassified\nthose with the highest confidence",
    )
    return figure
