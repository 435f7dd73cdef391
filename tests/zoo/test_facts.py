from __future__ import annotations

import pytest

from weightspace.zoo.facts import is_own, obstacle

OPEN = "apache-2.0 MIT bsd-3-clause gpl-3.0 lgpl-2.1 agpl-3.0 cc0-1.0 cc-by-4.0 cc-by-sa-3.0 cc-by-nc-sa-4.0 openrail"
CLOSED = "other unknown cc-by-nd-4.0 cc-by-nc-nd-3.0 llama3.1 gemma mitt apache-2.0-with-terms apache2 proprietary"


@pytest.mark.parametrize("licence", OPEN.split())
def test_open_licences_let_a_copy_be_published(licence: str) -> None:
    assert obstacle("org/model", licence) is None and obstacle("./mine", licence) is None


@pytest.mark.parametrize("licence", [*CLOSED.split(), "", "mit\n| x"])
def test_all_others_do_not(licence: str) -> None:
    assert f"licence {licence!r} is not known" in str(obstacle("org/model", licence))
    assert obstacle("./mine", licence) is not None


def test_without_a_licence_only_ones_own_models_are_published() -> None:
    assert obstacle("org/model", None) == "no licence known"
    for place in ("./run/model.safetensors", "/home/me/model.safetensors", "~/model", "C:\\models\\a"):
        assert obstacle(place, None) is None and is_own(place, None) and not is_own(place, "mit")
