// Picks the Linear kernels of the instruction-set path in use.
#include "kernels/linear.h"
#include "platform/per_isa.h"

namespace tokenmill {

TM_DEFINE_DISPATCH(LinearKernels, linear_kernels)

}  // namespace tokenmill
