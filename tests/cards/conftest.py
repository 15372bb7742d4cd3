"""Fixtures of the tests of cards."""

import pytest

from support.cards import run


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """They take most of the time: only for the tests that ask for the fixture `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("hf_rdrop.cards.card.plot_curves", lambda *_: False)


@pytest.fixture
def pictures():
    pass


@pytest.fixture(scope="package")
def trained(tmp_path_factory):
    """A trainer for the tests that only ask it for cards."""
    return run(tmp_path_factory.mktemp("trained"))
