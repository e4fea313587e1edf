# SPDX-License-Identifier: Apache-2.0
"""The square root by multiplications gives the bits of the processor's own for every number there is."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = "-O2 -std=c++17 -ffp-contract=off -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -DOPTKIT_ISA=avx512"
PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstring>
#include "cpu/vector.h"

using namespace optkit::avx512;

// Numbers whose fp32 bits are `first` to `first` + 15.
static Vec<float> numbers(uint64_t first) {
  uint32_t bits[16];
  for (int k = 0; k < 16; ++k) bits[k] = static_cast<uint32_t>(first) + k;
  Vec<float> a;
  std::memcpy(&a, bits, sizeof(a));
  return a;
}
static int differences(Vec<float> a, Vec<float> b) {
  uint32_t x[16], y[16];
  std::memcpy(x, &a, sizeof(a));
  std::memcpy(y, &b, sizeof(b));
  int different = 0;
  for (int k = 0; k < 16; ++k) different += x[k] != y[k];
  return different;
}

int main() {
  long all = 0, estimates = 0;
  for (uint64_t first = 0; first < 1ull << 32; first += 16)
    all += differences(sqrt(numbers(first)), multiplied_sqrt(numbers(first)));
  // The bits of the mantissa, for even and odd exponents.
  for (uint64_t first = 0x3f800000; first < 0x40800000; first += 16) {
    const Vec<float> a = numbers(first), root = sqrt(a);
    for (int part = -8; part <= 8; ++part) {
      Vec<float> inverse;
      for (int k = 0; k < 16; ++k)
        inverse.v[k] = static_cast<float>((1.0 + part * 0x1p-17) / std::sqrt(static_cast<double>(a.v[k])));
      estimates += differences(root, refined_sqrt(a, inverse));
    }
  }
  std::printf("%ld %ld\n", all, estimates);
}
"""


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs a C++ compiler for x86")
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="needs a processor with AVX-512")
def test_it_has_the_bits_of_the_instruction_for_all_operands_and_estimates(tmp_path):
    source, program = tmp_path / "roots.cpp", tmp_path / "roots"
    source.write_text(PROGRAM)
    subprocess.run([COMPILER, *FLAGS.split(), f"-I{CSRC}", source, "-o", program], check=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout.split() == ["0", "0"]
