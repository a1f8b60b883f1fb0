"""doctor: finds what is there, names what is wrong, and says what to do about it."""

import importlib.metadata

import pytest

from ftlab import doctor


def test_a_healthy_machine_has_no_problem_but_what_is_truly_missing():
    findings = {f.what: f for f in doctor.examine()}
    assert findings["torch"].verdict == doctor.OK
    assert findings["torch"].found == importlib.metadata.version("torch")
    assert findings["smollm2"].verdict == doctor.OK
    assert all(f.advice for f in findings.values() if f.verdict == doctor.WRONG)


def test_a_wrong_version_is_named_with_the_version_the_course_needs(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.0" if name == "trl" else real(name))
    (trl,) = [f for f in doctor.examine() if f.what == "trl"]
    assert trl.verdict == doctor.WRONG and trl.found == "1.15.0" and "==1.14.2" in trl.advice
    assert "WRONG" in doctor.report([trl]) and "1 problems" in doctor.report([trl])


def test_a_missing_package_and_a_missing_model_are_wrong_with_the_command_that_mends_them(monkeypatch, tmp_path):
    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "CACHE", tmp_path)
    findings = {f.what: f for f in doctor.examine()}
    assert findings["peft"].verdict == doctor.WRONG and 'pip install "peft' in findings["peft"].advice
    assert "ftlab.models" in findings["smollm2"].advice


@pytest.mark.parametrize("native, verdict", [(True, doctor.OK), (False, doctor.NOTE)])
def test_emulated_bf16_on_an_old_gpu_is_not_taken_for_native(monkeypatch, native, verdict):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert doctor._bf16().verdict == verdict


def test_ready_says_so_in_a_line_and_opens_what_is_wrong(monkeypatch):
    fine = [doctor.Finding("torch", doctor.OK, "2.13"), doctor.Finding("disk", doctor.OK, "9 GB <free>")]
    monkeypatch.setattr(doctor, "examine", lambda: fine)
    page = doctor.ready().data
    assert "<b>ready: </b>torch 2.13</summary>" in page and "9 GB &lt;free&gt;" in page and "<details open" not in page
    wrong = doctor.Finding("smollm2", doctor.WRONG, "not fetched yet", "python -m ftlab.models")
    monkeypatch.setattr(doctor, "examine", lambda: [*fine, wrong])
    page = doctor.ready().data
    assert "1 to mend" in page and "<details open" in page and "-&gt; python -m ftlab.models" in page
