// One vector type, as wide as the instruction set this file is compiled for. The only intrinsics of the library are in
// simd/, where each operation stands once per instruction set, side by side.
//
// Each kernel file is compiled once per instruction set, with LLMSYS_ISA naming the namespace (baseline, avx2, avx512,
// avx512_bf16). Everything here lives inside that namespace, so that no symbol compiled for a wide machine can stand in
// for a baseline one at link time. Arithmetic (+ - * /, comparisons, selection) is the compiler's vector extension,
// each operation rounded; multiply_add is the one that fuses two, so that no bit depends on what a compiler likes to
// fuse.
#pragma once

#include "simd/blocks.h"
#include "simd/conversions.h"
#include "simd/lanes.h"
#include "simd/loads.h"
#include "simd/loops.h"
#include "simd/vectors.h"
