"""DeepSpeed's extensions of a file of tests lie in a folder of its own: see engines.py. Nothing is
compiled by torch either: what DeepSpeed decorates would import the compiler, a second a process."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def extensions_of_this_file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield
