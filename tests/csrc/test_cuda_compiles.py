"""One file of ``csrc/cuda`` by nvcc, for one GPU: `make check-cuda` compiles all for all."""

import shutil

import pytest

from tests.csrc import check_cuda


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_one_file_compiles(tmp_path):
    cubin = check_cuda.compile_one("csrc/cuda/w4a4_linear.cu", "8.0", tmp_path)
    if nvdisasm := check_cuda.disassembler():
        check_cuda.check_products(cubin, "8.0", nvdisasm)
        with pytest.raises(AssertionError, match="int4 products"):
            check_cuda.check_products(cubin, "9.0a", nvdisasm)
