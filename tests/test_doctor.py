"""doctor: finds what is there, names what is wrong, and says what to do about it."""

import importlib.metadata
import sys
import types

import pytest
from shown import Page

from ftlab import doctor


def findings() -> dict[str, doctor.Finding]:
    return {found.what: found for found in doctor.examine()}


def test_a_healthy_machine_has_no_problem_but_what_is_truly_missing():
    found = findings()
    assert found["torch"] == ("torch", doctor.OK, importlib.metadata.version("torch"), "")
    assert found["smollm2"].verdict == doctor.OK
    assert all(f.advice for f in found.values() if f.verdict == doctor.WRONG)


def test_what_is_wrong_or_missing_is_named_with_what_mends_it(monkeypatch, tmp_path):
    real = importlib.metadata.distributions

    def distributions(name):
        if name == "trl":
            return [types.SimpleNamespace(version="1.15.0")]
        return [] if name in ("peft", "gguf") else real(name=name)

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    monkeypatch.setattr(doctor, "CACHE", tmp_path)
    found = findings()
    mends = {
        "trl": "trl==1.14.2",
        "peft": 'pip install "peft',
        "smollm2": "ftlab.models",
        "llama.cpp converter": "export",
    }
    for name, advice in mends.items():
        assert found[name].verdict == doctor.WRONG and advice in found[name].advice
    assert found["trl"].found == "1.15.0" and found["gguf"].verdict == doctor.NOTE
    text = doctor.report([found["trl"], found["torch"], found["peft"]])
    assert "WRONG" in text and found["trl"].advice in text and text.endswith("to mend: 2")
    assert doctor.report([found["torch"]]).endswith("ready")


@pytest.mark.parametrize(("free", "verdict"), [(2.9e9, doctor.WRONG), (9e9, doctor.OK)])
def test_too_little_room_and_missing_data_are_wrong(monkeypatch, tmp_path, free, verdict):
    monkeypatch.setattr("psutil.virtual_memory", lambda: (16e9, free))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    monkeypatch.setattr(doctor, "DATA", tmp_path if verdict == doctor.OK else tmp_path / "nowhere")
    found = findings()
    assert {found[name].verdict for name in ("memory", "disk", "data")} == {verdict}


def test_the_disk_is_the_one_on_which_the_cache_will_be(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(doctor, "CACHE", tmp_path / "not made" / "yet")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: asked.append(path) or types.SimpleNamespace(free=9e9))
    findings()
    assert asked == [tmp_path]


@pytest.mark.parametrize("native, verdict", [(True, doctor.OK), (False, doctor.NOTE)])
def test_emulated_bf16_on_an_old_gpu_is_not_taken_for_native(monkeypatch, native, verdict):
    import torch

    class Gpu:
        name, total_memory = "T4", 16e9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    found = findings()
    assert found["bf16"].verdict == verdict and "T4, 16 GB" in found["gpu"].found
    assert ("fp16=True" in found["bf16"].advice) == (not native)


@pytest.mark.parametrize("gone, probe", [("torch", "gpu"), ("psutil", "memory"), ("packaging.requirements", "ftlab")])
def test_a_module_that_cannot_be_imported_is_a_finding_and_ends_nothing(monkeypatch, gone, probe):
    monkeypatch.setitem(sys.modules, gone, None)  # import raises ModuleNotFoundError
    found = findings()
    assert found[probe].verdict == doctor.WRONG and gone in found[probe].found and found[probe].advice
    assert set(found) >= {"python", "disk", "smollm2", *doctor.OPTIONAL}
    assert f"-> {found[probe].advice}" in doctor.report(doctor.examine())


def test_without_ftlabs_own_metadata_the_table_says_so(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    found = findings()
    assert found["ftlab"].verdict == doctor.WRONG and "metadata" in found["ftlab"].found
    assert "pip install" in found["ftlab"].advice and found["memory"].found


def test_ready_says_so_in_a_line_and_opens_what_is_wrong(monkeypatch):
    fine = [doctor.Finding("torch", doctor.OK, "2.13"), doctor.Finding("disk", doctor.OK, "9 GB <free>")]
    monkeypatch.setattr(doctor, "examine", lambda: fine)
    page = doctor.ready().data
    assert Page(page).open.strip() == "ready: torch 2.13" and "9 GB <free>" in Page(page).text
    wrong = doctor.Finding("smollm2", doctor.WRONG, "missing", "python -m ftlab.models")
    monkeypatch.setattr(doctor, "examine", lambda: [*fine, wrong])
    page = doctor.ready().data
    assert "1 to mend" in Page(page).text and "-> python -m ftlab.models" in Page(page).open
