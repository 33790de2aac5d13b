#include "kernels/roofline.h"
#include "platform/per_isa.h"

namespace tokenmill {
TM_DEFINE_DISPATCH(RooflineKernels, roofline_kernels)
}  // namespace tokenmill
