from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace.errors import CheckpointError
from weightspace.io.locations import parse_ref
from weightspace.schema import ModelRef

word = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=12)
part = st.lists(word, min_size=1, max_size=3).map(".".join)
refs = st.builds(
    ModelRef,
    st.tuples(part, part).map("/".join),
    st.none() | st.lists(word, min_size=1, max_size=3).map("/".join),
    st.none() | st.lists(part, min_size=1, max_size=3).map("/".join),
)


@given(ref=refs.filter(lambda ref: not ref.location.endswith(".git")))
def test_printed_refs_parse_to_themselves(ref: ModelRef) -> None:
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelRef("org/name")),
        ("org/name@v1.0", ModelRef("org/name", "v1.0")),
        ("org/name@refs/pr/1:a/b", ModelRef("org/name", "refs/pr/1", "a/b")),
        ("org/name:unet", ModelRef("org/name", None, "unet")),
        ("model.safetensors", ModelRef("model.safetensors")),
        ("/srv/models/a@b:c", ModelRef("/srv/models/a@b:c")),
        ("./models@home", ModelRef("./models@home")),
        ("~/models@home", ModelRef("~/models@home")),
        ("runs/7/model.safetensors", ModelRef("runs/7/model.safetensors")),
        ("my runs/model 1", ModelRef("my runs/model 1")),
        (r"C:\models\a", ModelRef(r"C:\models\a")),
    ],
)
def test_paths_and_repositories(text: str, expected: ModelRef) -> None:
    assert parse_ref(text) == expected


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "model@step:5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_ref("runs/model@step:5") == ModelRef("runs/model@step:5")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "path or org/name"),
        ("  ", "path or org/name"),
        ("org/name\n", r"org/name\\n"),
        ("org/na\u202eme", r"na\\u202eme"),
        ("https://huggingface.co/org/name", "URLs"),
        ("hf://org/name", "URLs"),
        ("org/na me@main", "'org/na me'"),
        ("-org/name@main", "'-org/name'"),
        ("org/na--me@main", "'org/na--me'"),
        ("org/name.git@main", "'org/name.git'"),
        (f"org/{'n' * 93}@main", "96 characters"),
        ("org/name@", "revision ''"),
        ("org/name@../main", r"revision '\.\./main'"),
        ("org/name@a..b", r"revision 'a\.\.b'"),
        ("org/name@-rf", "revision '-rf'"),
        ("org/name:", "subfolder ''"),
        ("org/name:..", r"subfolder '\.\.'"),
        ("org/name:a/../../b", r"subfolder 'a/\.\./\.\./b'"),
        ("org/name:/etc", "subfolder '/etc'"),
        ("org/name:a//b", "subfolder 'a//b'"),
        (r"org/name:a\b", "subfolder"),
    ],
)
def test_malformed_refs_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        parse_ref(text)
    assert "\n" not in str(caught.value)
