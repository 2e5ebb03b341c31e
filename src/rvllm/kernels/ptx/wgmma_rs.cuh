// wgmma with its first operand in registers, for more columns than ptx/wgmma.cuh has.
#pragma once

#include "ptx/wgmma.cuh"

namespace rvllm::ptx {
RVLLM_WGMMA_RS_ALL(192, RVLLM_R96, "%96,%97,%98,%99", "100", "101", RVLLM_F64(0), RVLLM_F32(64))
}  // namespace rvllm::ptx
