// SPDX-License-Identifier: Apache-2.0
// What marks a function that runs on the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define OPTKIT_HD __host__ __device__ __forceinline__
#else
// always_inline, so that no copy of a function compiled for one instruction set can be picked by the linker for
// another.
#define OPTKIT_HD inline __attribute__((always_inline))
#endif
