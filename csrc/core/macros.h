// SPDX-License-Identifier: Apache-2.0
// Qualifiers of a function that runs on the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define OPTKIT_HD __host__ __device__ __forceinline__
#else
// always_inline: otherwise the linker could pick a copy that was compiled for another instruction set.
#define OPTKIT_HD inline __attribute__((always_inline))
#endif
