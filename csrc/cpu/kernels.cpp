// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with -DOPTKIT_ISA=baseline, avx2 or avx512 and the matching flags. This file
// instantiates nothing from the standard library, and every function is inlined or in the namespace of its instruction
// set: otherwise the linker could keep the AVX-512 copy for all of them.
#include "cpu/norm_loop.h"
#include "cpu/step_loop.h"
#include "cpu/unit_loop.h"

namespace optkit {
namespace OPTKIT_ISA {

#define OPTKIT_STRING2(x) #x
#define OPTKIT_STRING(x) OPTKIT_STRING2(x)
#define OPTKIT_STEP_FLOAT(name, type) &step_chunk<type, float>,
#define OPTKIT_STEP_DOUBLE(name, type) &step_chunk<type, double>,
#define OPTKIT_MEASURE_FLOAT(name, type) measure_chunk<type, float>(),
#define OPTKIT_MEASURE_DOUBLE(name, type) measure_chunk<type, double>(),
#define OPTKIT_FACTORS_FLOAT(name, type) factor_kernels<type, float>(),
#define OPTKIT_FACTORS_DOUBLE(name, type) factor_kernels<type, double>(),

extern const NormKernels norm_kernels;  // layer_norm_kernels.cpp
extern const Kernels kernels;
const Kernels kernels = {
    OPTKIT_STRING(OPTKIT_ISA),
    {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_STEP_FLOAT)},
    {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_STEP_DOUBLE)},
    {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_MEASURE_FLOAT)},
    {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_MEASURE_DOUBLE)},
    {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_FACTORS_FLOAT)},
    {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_FACTORS_DOUBLE)},
    &norm_chunk<float>,
    &norm_chunk<double>,
    &measure_units<float>,
    &measure_units<double>,
    &norm_kernels,
};

}  // namespace OPTKIT_ISA
}  // namespace optkit
