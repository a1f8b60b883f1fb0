"""ftlab.classroom.entries: each entry is made where it stands; what cannot be read is the caller's own error."""

from types import SimpleNamespace

import pytest
import yaml

from ftlab.classroom import entries


class ThingError(ValueError):
    """What the caller of `read` raises."""


def read(folder, text: str) -> list:
    (folder / "things.yaml").write_text(text, encoding="utf-8")
    return entries.read(
        folder / "things.yaml", lambda entry, where: SimpleNamespace(id=entry, where=where), "thing", ThingError
    )


def test_entries_are_made_in_their_order_and_told_where_they_stand(tmp_path):
    made = [(one.id, one.where) for one in read(tmp_path, "[b, ü, a]")]
    assert made == [("b", "things.yaml, thing 1"), ("ü", "things.yaml, thing 2"), ("a", "things.yaml, thing 3")]
    assert read(tmp_path, "[]") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "things.yaml: not valid YAML: while parsing"),
        ("!!python/tuple [1]", "things.yaml: not valid YAML: could not determine a constructor"),
        ("a: b", "things.yaml: got dict, wanted a list of things"),
        ("", "things.yaml: got NoneType, wanted a list of things"),
        ("[c, b, a, b, a]", "things.yaml: the id 'a' stands twice"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, text, message):
    with pytest.raises(ThingError) as failed:
        read(tmp_path, text)
    assert str(failed.value).startswith(message)
    assert isinstance(failed.value.__cause__, yaml.YAMLError) == ("YAML" in message)
