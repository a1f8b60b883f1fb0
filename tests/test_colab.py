"""experiments/colab/run.py: what it reads off a `pip freeze`, and which packages count as replaced."""

from scripts import script

colab = script("experiments/colab/run.py")


def test_pins_are_the_names_as_pip_compares_them_without_local_versions():
    freeze = "torch==2.11.0+cu128\nPillow==12.0.0\nruamel.yaml==0.18\n-e git+https://x/y\nz @ file:///z\n"
    assert colab.pins(freeze) == {"torch": "2.11.0", "pillow": "12.0.0", "ruamel-yaml": "0.18"}
    assert colab.pins('numpy==2.4.0 ; python_version >= "3.11"\n') == {"numpy": "2.4.0"}


def test_what_has_another_version_or_is_gone_is_changed_and_what_came_is_not():
    before, after = {"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}
    assert colab.changed(before, after) == {"b": ["1", "2"], "c": ["1", ""]}
