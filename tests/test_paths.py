"""ftlab.paths: in a clone the repository's data, in an installed wheel the wheel's own."""

import runpy
import shutil
from pathlib import Path

from ftlab import paths


def folders_of(place: Path) -> tuple[Path, Path]:
    """DATA and EXPERIMENTS, as the file says them when the package lies in this place."""
    (place / "ftlab").mkdir(exist_ok=True)
    said = runpy.run_path(str(shutil.copy(paths.__file__, place / "ftlab")))
    return said["DATA"], said["EXPERIMENTS"]


def test_a_wheel_takes_its_own_data_and_not_a_folder_of_that_name_beside_it(tmp_path):
    (tmp_path / "data").mkdir()
    assert folders_of(tmp_path) == (tmp_path / "data", tmp_path / "experiments")
    (tmp_path / "ftlab" / "_data").mkdir()
    inside = tmp_path / "ftlab"
    assert folders_of(tmp_path) == (inside / "_data", inside / "_experiments")
