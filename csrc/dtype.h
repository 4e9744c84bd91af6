// The element types that kernels accept. The numbers are shared with llmsys/ops/_native.py.
#pragma once

namespace llmsys {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace llmsys
