#include "kernels/pointwise.h"
#include "platform/per_isa.h"

namespace tokenmill {

TM_DEFINE_DISPATCH(PointwiseKernels, pointwise_kernels)

}  // namespace tokenmill
