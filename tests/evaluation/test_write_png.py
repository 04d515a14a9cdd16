from pathlib import Path

import cv2
import numpy as np
import pytest

from ws_detectron.errors import UserError
from ws_detectron.evaluation.drawing import write_png


def test_pictures_are_written_as_they_are(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    write_png(tmp_path / "new" / "a.png", picture)
    found = cv2.imread(str(tmp_path / "new" / "a.png"))[:, :, ::-1]
    np.testing.assert_array_equal(found, picture)


def test_other_formats_and_unwritable_paths_are_refused(tmp_path: Path) -> None:
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"a\.jpg: .* must end in \.png"):
        write_png(tmp_path / "a.jpg", picture)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "file" / "a.png", picture)
