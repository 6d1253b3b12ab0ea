"""DeepSpeed's extensions of a test session lie in a folder of its own: see engines.py."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def extensions_of_this_session(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield
