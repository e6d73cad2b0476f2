"""Memory maps of compiled functions: what is compiled is forgotten before a process has too many."""

import jax
import pytest

from sami_ppl._util import maps


@pytest.mark.skipif(not maps.MAPS.exists(), reason="this system has no such limit")
def test_what_is_compiled_is_forgotten_where_it_is_much(counted):
    traced = counted(lambda x: x + 1)
    function = jax.jit(lambda x: traced(x))
    function(1.0)
    assert not maps.forget_if_many()
    function(1.0)
    assert traced.calls == 1
    assert maps.forget_if_many(0.0)
    function(1.0)
    assert traced.calls == 2


def test_other_systems_have_no_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(maps, "LIMIT", tmp_path / "none")
    assert not maps.forget_if_many(0.0)
