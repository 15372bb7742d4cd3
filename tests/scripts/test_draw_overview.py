"""The README's picture is drawn by its script."""

import numpy as np
import pytest
from PIL import Image

import draw_overview
from support import ROOT

COMMITTED = ROOT / "model_cards" / "overview.png"


def test_the_committed_picture_is_what_the_script_draws(tmp_path):
    draw_overview.main(["--output", str(tmp_path / "picture.png")])
    with Image.open(tmp_path / "picture.png") as drawn, Image.open(COMMITTED) as committed:
        assert drawn.size == committed.size
        grey = [np.asarray(picture.convert("L"), dtype=int) for picture in (drawn, committed)]
    assert (abs(grey[0] - grey[1]) > 64).mean() < 0.01  # fonts differ a little


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="Make it first"):
        draw_overview.main(["--output", str(tmp_path / "none" / "picture.png")])
