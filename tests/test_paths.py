"""ftlab.paths: in a clone the repository's data, in an installed wheel the wheel's own."""

import runpy
import shutil
from pathlib import Path

from ftlab import paths


def data_of(place: Path) -> Path:
    """DATA, as the file says it when the package lies in this place."""
    (place / "ftlab").mkdir(exist_ok=True)
    return Path(runpy.run_path(str(shutil.copy(paths.__file__, place / "ftlab")))["DATA"])


def test_a_wheel_takes_its_own_data_and_not_a_folder_of_that_name_beside_it(tmp_path):
    (tmp_path / "data").mkdir()
    assert data_of(tmp_path) == tmp_path / "data"
    (tmp_path / "ftlab" / "_data").mkdir()
    assert data_of(tmp_path) == tmp_path / "ftlab" / "_data"
